"""The report of a pruning as JSON, as text, and as a page with figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wanda_lightning.common import wording
from wanda_lightning.common.aliases import StrPath
from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.grouping import grouped
from wanda_lightning.models import SkippedMatrix
from wanda_lightning.report import descriptions, figures
from wanda_lightning.report.descriptions import METRICS
from wanda_lightning.report.records import Circumstances, ReportData, as_json, from_parsed

REPORT_NAME = "pruning_report.json"
_VERSION = 1  # of the JSON; a report without a version is older
_SHOWN_REASONS = 3  # in the summary
_IS_SMALLER = (
    "what was taken out counts as sparsity: this report has the shapes of the larger model"
)


@dataclass(frozen=True, repr=False)
class PruningReport(ReportData):
    """Every matrix of the model, pruned or skipped, with totals, times, configuration and versions.

    `print(report)` gives a summary, `table()` has a row for each layer, and `save()` writes JSON, a page or a picture.
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
        metrics = {"sparsity/model": self.model_sparsity, "sparsity/pruned_layers": self.sparsity}
        for name, layers in self.rows().items():
            metrics[f"sparsity/{name}"] = layers.sparsity
        return metrics

    def marked_as_shrunk(self) -> PruningReport:
        """Return the report of a model out of which the hidden units that became zero were taken."""
        return replace(self, shrunk=True, notes=(*self.notes, _IS_SMALLER))

    def to_json(self) -> str:
        """The whole report as JSON."""
        totals = {name: getattr(self, name) for name in ("sparsity", "model_sparsity", "coverage")}
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
    def load(cls, path: StrPath) -> PruningReport:
        """Read a file that `save` wrote, or the one in a folder. A ValueError names a file that is not a report."""
        file = Path(path)
        if file.is_dir():
            file = file / REPORT_NAME
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not a report: {error}") from error

    def save(self, path: StrPath) -> Path:
        """Write the report atomically and return the path of the file.

        Args:
            path: A file that ends with `.json` (the whole report, which `load` reads), `.html` (a page with figures and
                tables in one file, which needs no network) or `.png` (the figures of the page). Any other path is a
                folder, into which `pruning_report.json` is written.

        Raises:
            ImportError: For a page or a picture, if the extra `report` is not installed.
        """
        file = Path(path)
        suffix = file.suffix.lower()
        if suffix not in (".json", ".html", ".png") or file.is_dir():
            file = file / REPORT_NAME
            suffix = ".json"

        if suffix == ".html":
            content = self._page().encode()
        elif suffix == ".png":
            content = self._picture()
        else:
            content = self.to_json().encode()
        with atomic_write(file) as temporary:
            temporary.write_bytes(content)
        return file

    def _page(self) -> str:
        from jinja2 import Environment, PackageLoader, StrictUndefined

        jinja = Environment(
            loader=PackageLoader("wanda_lightning", "report/templates"),
            undefined=StrictUndefined,
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        jinja.filters.update(percent="{:.2%}".format, duration=wording.duration)
        run = self.run or Circumstances()
        return jinja.get_template("report.html").render(
            report=self,
            run=run,
            metric=METRICS.get(run.metric),
            plots={plot.name: plot for plot in figures.plots_of(self)},
            figures=figures,
            descriptions=descriptions,
            wording=wording,
        )

    def _picture(self) -> bytes:
        title = f"{descriptions.title_of(self)}: {descriptions.method_in_words(self.config)}"
        figure = figures.to_figure(figures.plots_of(self), title)
        content = BytesIO()
        figure.savefig(content, format="png", dpi=144)
        return content.getvalue()

    def __str__(self) -> str:
        """The method, the totals, the change in quality if it was measured, and the notes."""
        run = self.run or Circumstances()
        calibration = f", calibrated on {run.calibration}" if run.calibration else ""
        lines = [f"{descriptions.change_in_words(self)}{calibration}.", self.summary()]
        if self.skipped:
            reasons = Counter(matrix.detail for matrix in self.skipped).most_common(_SHOWN_REASONS)
            shown = "; ".join(f"{reason}: {number}" for reason, number in reasons)
            matrices = wording.quantity(len(self.skipped), "matrix", "matrices")
            lines.append(f"Left as they are: {matrices} ({shown}).")
        lines += [descriptions.change_of(METRICS[run.metric], result) for result in run.results]
        lines += [f"Note: {note}" for note in self.notes]
        lines.append(
            "report.table() has a row for each layer, and so has report.save('report.html')."
        )
        return "\n".join(lines)

    __repr__ = __str__  # for notebooks: that of a dataclass fills many pages

    def table(self) -> str:
        """The tables of pruned layers, one row for all experts of a module, and of what was left as it is, as text."""
        pruned = _table("Pruned layers", "layer", "shape", "target", "sparsity", "tokens", "note")
        for name, layers in self.rows().items():
            pruned.add_row(
                escape(name),
                " x ".join(map(str, layers[0].shape)),
                layers.range("target", ".2%"),
                layers.range("sparsity", ".2%"),
                layers.range("tokens", ","),
                escape(layers.remarks),
            )

        # Without emoji, which `N:M:` would become.
        console = Console(width=140, color_system=None, highlight=False, emoji=False)
        with console.capture() as capture:
            console.print(pruned)
            if self.skipped:
                console.print(skipped_table(self.skipped))
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
