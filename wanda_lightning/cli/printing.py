"""Print lines and tables as they are, on a terminal and in files."""

from rich.console import Console
from rich.table import Table


def print_line(line: str) -> None:
    """Print a line as it is."""
    Console(emoji=False).print(line, markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table, as wide as it is where the output is not a terminal."""
    console = Console(emoji=False)  # `N:M:` would contain one
    if not console.is_terminal:
        width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console.width = max(console.width, width)
    console.print(table)
