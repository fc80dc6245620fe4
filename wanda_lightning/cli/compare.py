"""`wanda-lightning compare`: several prunings side by side."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from wanda_lightning.cli.options import CompareOptions
from wanda_lightning.cli.output import print_line, print_table
from wanda_lightning.report import comparison_table, groups_of, read_reports, write_comparison


def run(options: CompareOptions) -> None:
    """Print one table for each model and data set, and write the page."""
    reports = read_reports(options.reports)
    for group in groups_of(reports):
        found = comparison_table(group)
        table = Table(title=escape(group.title), title_justify="left")
        for heading in found.headings:
            table.add_column(heading.text, justify="right" if heading.is_number else "left", overflow="fold")
        for row in found.rows:
            table.add_row(*(escape(cell.text) for cell in row))
        print_table(table)
    if options.report is not None:
        write_comparison(reports, options.report)
        print_line(f"The comparison is in {options.report}.")
