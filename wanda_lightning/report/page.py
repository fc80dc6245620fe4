"""A report as one HTML file that needs no network, as a picture, and as arrays."""

from __future__ import annotations

from os import PathLike
from typing import Any

from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.common.checks import check_report_path
from wanda_lightning.report import descriptions, figures
from wanda_lightning.report.records import ReportData, Run


def write_report(report: ReportData, path: str | PathLike[str]) -> None:
    """Write a report as a page (.html) or as a picture of its figures (.png)."""
    (write_html if check_report_path(path) == ".html" else write_png)(report, path)


def write_html(report: ReportData, path: str | PathLike[str]) -> None:
    """Write a report as one HTML file."""
    plots = {plot.name: plot for plot in figures.plots_of(report)}  # refuses if Jinja is not installed
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("wanda_lightning", "report/templates")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters["percent"] = "{:.2%}".format
    template = jinja.get_template("report.html")
    page = template.render(
        report=report, run=report.run or Run(), descriptions=descriptions, figures=figures, plots=plots
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write_png(report: ReportData, path: str | PathLike[str]) -> None:
    """Write the figures of a report into one PNG file."""
    with atomic_write(path) as temporary:
        title = f"{descriptions.title_of(report)}: {descriptions.method_in_words(report.config)}"
        figures.to_png(figures.plots_of(report), temporary, title)


def images_of(report: ReportData) -> dict[str, Any]:
    """Return each figure by name as an array, (height, width, 3), of bytes."""
    return {plot.name: figures.to_array(plot) for plot in figures.plots_of(report)}
