"""Print tables, notes and warnings so that they are readable on any terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WORD = 16  # longer words of a heading may break


def print_table(table: Table) -> None:
    """Print a table, wider than the terminal if numbers would be cut off otherwise."""
    console = Console(emoji=False)  # `N:M:` would contain one
    wide = console.options.update(max_width=10_000)
    if Measurement.get(console, wide, table).maximum > console.width:
        for column in table.columns:
            if column.justify == "right":
                words = (word for word in str(column.header).split() if len(word) <= _WORD)
                column.width = max(map(len, (*words, *map(str, column.cells))))
    console.width = max(console.width, Measurement.get(console, wide, table).minimum)
    console.print(table)


def print_line(line: str) -> None:
    """Print a line as it is."""
    Console(emoji=False).print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def readable_output() -> Iterator[None]:
    """Print each warning on one line without the source path, and hide what users can do nothing about."""
    form = warnings.formatwarning
    warnings.formatwarning = _one_line
    # Lightning 2.6 calls torch 2.13 in a deprecated way at every dataloader.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    # peft 0.21 calls transformers 5.24 in a deprecated way for every model with adapters.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    for name in ("torchao", "torch.utils._pytree"):  # about kernels for other devices, if torchao is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.formatwarning = form


def _one_line(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    return f"wanda-lightning: warning: {message}\n"
