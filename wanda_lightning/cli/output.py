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
from rich.text import Text

_NARROW = 16  # width to which rich folds columns of text


def print_table(table: Table) -> None:
    """Print a table; if its numbers would be cut off, print one `heading: value` per line instead."""
    console = Console(emoji=False)  # `N:M:` would contain one
    if _width(console, table) <= console.width:
        console.print(table)
        return
    headings = [str(column.header) for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for heading, cell in zip(headings, cells, strict=True):
            text = Text.from_markup(f"{heading}: {cell}" if heading else str(cell), emoji=False)
            console.print(text, soft_wrap=True)


def _width(console: Console, table: Table) -> int:
    """Keep rich from cutting numbers, and return the width that the table needs at least."""
    wide = console.options.update(max_width=10_000)
    is_too_wide = Measurement.get(console, wide, table).maximum > console.width
    width = 1
    for column in table.columns:
        heading = Measurement.get(console, wide, column.header).minimum  # headings may break between words
        widest = max([heading, *(Measurement.get(console, wide, cell).maximum for cell in column.cells)])
        if column.justify == "right" and is_too_wide:
            column.width = widest  # rich would ignore a `min_width` here
        width += (widest if column.justify == "right" else min(widest, _NARROW)) + 3
    return width


def print_line(line: str) -> None:
    """Print a line as it is."""
    Console(emoji=False).print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def readable_warnings() -> Iterator[None]:
    """Print each warning on one line without the source path, and hide warnings that users can do nothing about."""
    form = warnings.formatwarning
    warnings.formatwarning = _one_line
    # Lightning 2.6 calls torch 2.13 in a deprecated way at every dataloader.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    # peft 0.21 calls transformers 5.24 in a deprecated way for every model with adapters.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        yield
    finally:
        warnings.formatwarning = form


def _one_line(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    return f"wanda-lightning: warning: {message}\n"


def quiet_libraries() -> None:
    """Hide what libraries log at every start: Lightning about hardware, torchao about kernels for other devices."""
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao if it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    import lightning.pytorch  # which sets its level when it is imported

    logging.getLogger(lightning.pytorch.__name__).setLevel(logging.WARNING)
