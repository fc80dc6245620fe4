"""Print a table, or plain lines on a terminal that is too narrow for it."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_NARROW = 16  # text columns fold down to this width


def print_table(table: Table) -> None:
    """Print a table; where its numbers would be cut off, print one `heading: value` per line instead."""
    console = Console(emoji=False)  # `N:M:` would hold one
    if _width(console, table) <= console.width:
        console.print(table)
        return
    headings = [str(column.header) for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for heading, cell in list(zip(headings, cells, strict=True)):
            text = Text.from_markup(f"{heading}: {cell}" if heading else str(cell), emoji=False)
            console.print(text, soft_wrap=True)


def print_note(note: str) -> None:
    """Print a note below a table."""
    Console(emoji=False).print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def _width(console: Console, table: Table) -> int:
    """Keep numbers from being cut, and return the narrowest width of the table in which they are whole."""
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
