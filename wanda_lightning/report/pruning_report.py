"""The report of a pruning as JSON, as text, and as a page with figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wanda_lightning.common import wording
from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.common.checks import check_report_path
from wanda_lightning.common.errors import UserError
from wanda_lightning.models import SkippedMatrix
from wanda_lightning.report import descriptions, figures
from wanda_lightning.report.descriptions import METRICS
from wanda_lightning.report.records import Circumstances, ReportData, as_json, from_parsed, grouped

REPORT_NAME = "pruning_report.json"
_VERSION = 1  # of the JSON; a report without a version is older, and has the same fields


@dataclass(frozen=True)
class PruningReport(ReportData):
    """Every matrix of the model, pruned or skipped, with totals, times, configuration and versions.

    `str()` gives a table with one row for all experts of a module; `save()` writes `pruning_report.json`.
    """

    def summary(self) -> str:
        """The totals as text."""
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        return (
            f"{wording.quantity(len(self.layers), 'layer')} with {self.coverage:.1%} "
            f"of {self.parameters:,} parameters. "
            f"Sparsity: {self.sparsity:.2%} of the pruned layers, "
            f"{self.model_sparsity:.2%} of all parameters, biases included. {self.total_seconds:.1f} s ({stages})."
        )

    def metrics(self) -> dict[str, float]:
        """The metrics for a logger: `sparsity/model`, `sparsity/pruned_layers`, and one for each of `rows()`."""
        return {
            "sparsity/model": self.model_sparsity,
            "sparsity/pruned_layers": self.sparsity,
            **{f"sparsity/{name}": layers.sparsity for name, layers in self.rows().items()},
        }

    def to_json(self) -> str:
        """The whole report as JSON."""
        totals = {
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "coverage": self.coverage,
        }
        return as_json({"version": _VERSION, **totals, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> PruningReport:
        """Construct a report from the JSON that `to_json` returned, now or in an older version."""
        content = json.loads(text)
        if content.get("version", 0) > _VERSION:
            raise UserError(
                f"version must be at most {_VERSION}, but it is {content['version']!r}: upgrade."
            )
        return from_parsed(cls, content)

    @classmethod
    def load(cls, path: str | Path) -> PruningReport:
        """Read a file that `save` wrote, or the one in a folder. A ValueError names a file that is not a report."""
        file = Path(path, REPORT_NAME) if Path(path).is_dir() else Path(path)
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is not a report: {error}") from error

    def to_html(self, path: str | Path) -> None:
        """Write a page with figures and tables: one file, which needs no network. Needs the extra `report`."""
        plots = {plot.name: plot for plot in figures.plots_of(self)}
        from jinja2 import Environment, PackageLoader, StrictUndefined

        loader = PackageLoader("wanda_lightning", "report/templates")
        options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
        jinja = Environment(loader=loader, undefined=StrictUndefined, **options)
        jinja.filters |= {"percent": "{:.2%}".format, "duration": wording.duration}
        template = jinja.get_template("report.html")
        run = self.run or Circumstances()
        texts = {
            "descriptions": descriptions,
            "wording": wording,
            "metric": METRICS.get(run.metric),
        }
        with atomic_write(path) as temporary:
            temporary.write_text(
                template.render(report=self, run=run, figures=figures, plots=plots, **texts),
                "utf-8",
            )

    def to_png(self, path: str | Path) -> None:
        """Write the figures of the page into one picture. Needs the extra `report`."""
        title = f"{descriptions.title_of(self)}: {descriptions.method_in_words(self.config)}"
        figure = figures.to_figure(figures.plots_of(self), title)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=144)

    def write(self, path: str | Path) -> None:
        """Write the page (.html) or the picture of its figures (.png)."""
        check_report_path(path)
        (self.to_html if Path(path).suffix.lower() == ".html" else self.to_png)(path)

    def save(self, folder: str | Path) -> Path:
        """Write `pruning_report.json` into a folder, atomically, and return its path."""
        with atomic_write(path := Path(folder) / REPORT_NAME) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")
        return path

    def __str__(self) -> str:
        """The report as a table."""
        pruned = _table("Pruned layers", "layer", "shape", "target", "sparsity", "tokens", "note")
        for name, layers in self.rows().items():
            shape = " x ".join(map(str, layers[0].shape))
            numbers = (
                layers.range("target", ".2%"),
                layers.range("sparsity", ".2%"),
                layers.range("tokens", ","),
            )
            pruned.add_row(escape(name), shape, *numbers, escape(layers.remarks))
        # `N:M:` is not an emoji.
        console = Console(width=140, color_system=None, highlight=False, emoji=False)
        with console.capture() as capture:
            console.print(pruned, *([skipped_table(self.skipped)] if self.skipped else []))
            console.print(
                *(f"Note: {note}" for note in self.notes), self.summary(), sep="\n", markup=False
            )
        return capture.get()


def skipped_table(skipped: Sequence[SkippedMatrix]) -> Table:
    """A table of the skipped matrices with one row for each reason."""
    table = _table("Left as they are", "reason", "matrices", "parameters", "first")
    for reason, matrices in grouped(skipped, lambda matrix: matrix.detail).items():
        size = sum(matrix.size for matrix in matrices)
        table.add_row(escape(reason), str(len(matrices)), f"{size:,}", escape(matrices[0].name))
    return table


def _table(title: str, *headings: str) -> Table:
    """An empty table: text columns, which are the outer ones, to the left, and numbers to the right."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        is_text = heading in (headings[0], headings[-1])
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    return table
