"""A report as one HTML file that needs no network, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import PurePath
from typing import Any

from wanda_lightning.checks import check_report_path, require_report_extra
from wanda_lightning.files import whole_file
from wanda_lightning.report.facts import (
    Grid,
    dense_by_reason,
    expert_tokens,
    mean_error,
    method_of,
    settings,
    sparsity_grid,
)
from wanda_lightning.report.figures import to_array, to_png, to_svg
from wanda_lightning.report.plots import Plot, plots_of
from wanda_lightning.report.pruning_report import PrunedLayer, PruningReport, Run, note_of, share_of_zeros, text_range
from wanda_lightning.report.theme import COLORS
from wanda_lightning.report.words import change, count, counted, duration, metric_name, result

_WIDE, _NARROW = 970, 360  # pixels of a figure; the page shows the one that fits

Path = str | PathLike[str]


def write_report(report: PruningReport, path: Path) -> None:
    """Write a report as a page (.html) or as a picture of its figures (.png)."""
    (write_html if check_report_path(path) == ".html" else write_png)(report, path)


def write_html(report: PruningReport, path: Path) -> None:
    """Write a report as one HTML file."""
    require_report_extra()
    write_page(path, "report.html", report_page(report))


def write_png(report: PruningReport, path: Path) -> None:
    """Write the figures of a report into one PNG file."""
    require_report_extra()
    with whole_file(path) as temporary:
        to_png(plots_of(report), temporary, f"{title_of(report)}: {method_of(report.config)}")


def images_of(report: PruningReport) -> dict[str, Any]:
    """Return each figure by name as an array, (height, width, 3), of bytes."""
    require_report_extra()
    return {plot.name: to_array(plot) for plot in plots_of(report)}


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Fill a template and write it atomically."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("wanda_lightning", "report/templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(template).render(colors=COLORS, **content)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class Column:
    """A column of a table: numbers are aligned to the right, names are set in a fixed width, long texts may wrap."""

    text: str
    kind: str = ""

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers."""
        return self.kind == "number"

    @property
    def is_code(self) -> bool:
        """Whether it holds names from the model."""
        return self.kind == "code"

    @property
    def is_long(self) -> bool:
        """Whether it holds sentences."""
        return self.kind == "text"


@dataclass(frozen=True)
class Cell:
    """A cell of a table, with the number by which it is sorted if there is one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table that can be sorted and searched."""

    headings: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Tile:
    """A number in large type with its name, and what else there is to know about it."""

    name: str
    value: str
    detail: str = ""


def drawn(plots: Sequence[Plot]) -> dict[str, dict[str, Any]]:
    """Return each plot by name as SVG for wide and for narrow windows."""
    from markupsafe import Markup

    widths = {"wide": _WIDE, "narrow": _NARROW}
    return {plot.name: {name: Markup(to_svg(plot, width)) for name, width in widths.items()} for plot in plots}


def title_of(report: PruningReport) -> str:
    """Return the name of the model, without the folder of a file, or what is known instead."""
    name = report.run.model if report.run else ""
    is_path = name.startswith(("/", ".", "~")) or name.endswith(".gguf")
    return (PurePath(name).name if is_path else name) or f"A model of {count(report.parameters)} parameters"


def report_page(report: PruningReport) -> dict[str, Any]:
    """Return what the template shows of a report."""
    experts, figures = expert_tokens(report), drawn(plots_of(report))
    pooled = sum(each.pooled for each in experts)
    return {
        "title": title_of(report),
        "report": report,
        "run": report.run,
        "verdict": _verdict(report),
        "tile_list": _tiles(report),
        "plots": {name: figures.get(name) for name in ("weights", "sparsity", "error", "parts", "experts", "training")},
        "allocation": _allocation(sparsity_grid(report), report),
        "no_errors": _why_no_errors(report),
        "block_errors": _block_errors(report),
        "recovered": _has(report, "recovery", "NoRecovery"),
        "experts": _experts_table(report) if experts else None,
        "pooled": f"{counted(pooled, 'matrix', 'matrices')} received too few and used the statistics of all experts of "
        "their module."
        if pooled
        else "",
        "layers": _layers_table(report),
        "dense": _dense_table(report),
        "dense_groups": dense_by_reason(report),
        "zero_shot": _zero_shot(report.run),
        "made_with": _made_with(report),
    }


def _verdict(report: PruningReport) -> str:
    """Say in two sentences what was done and what it cost."""
    text = (
        f"Pruned with {method_of(report.config)} in {duration(report.total_seconds)}: {report.sparsity:.2%} of the "
        f"weights in {counted(len(report.layers), 'layer')} are zero, {report.model_sparsity:.2%} of all "
        f"{count(report.parameters)} parameters."
    )
    run = report.run
    if run is None or run.after is None:
        return f"{text} The effect on the predictions was not measured."
    where = f" on {run.data}" if run.data else ""
    subject = metric_name(run.metric)
    if run.before is None:
        return f"{text} {subject}{where} is {result(run.metric, run.after)} afterward."
    how = "rose" if run.after > run.before else "fell" if run.after < run.before else "stayed"
    moved = f"{how} from {result(run.metric, run.before)} to {result(run.metric, run.after)}"
    return f"{text} {subject}{where} {moved if how != 'stayed' else f'stayed at {result(run.metric, run.after)}'}."


def _tiles(report: PruningReport) -> list[Tile]:
    tiles = [
        Tile("Zeros in pruned layers", f"{report.sparsity:.2%}", f"{report.model_sparsity:.2%} of the whole model"),
        Tile("Time to prune", duration(report.total_seconds), _slowest(report)),
        Tile("Method", method_of(report.config)),
    ]
    if (run := report.run) and run.metric and run.after is not None:
        detail = f"dense {result(run.metric, run.before)}, {change(run.metric, run.before, run.after)}"
        tiles.insert(
            1, Tile(metric_name(run.metric), result(run.metric, run.after), detail if run.before is not None else "")
        )
    return tiles


def _slowest(report: PruningReport) -> str:
    stages = [(stage, seconds) for stage, seconds in report.seconds.items() if seconds >= 0.05 * report.total_seconds]
    return ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in stages) if len(stages) > 1 else ""


def _allocation(grid: Grid, report: PruningReport) -> str:
    if len(set(grid.known)) == 1:
        return f"Every layer has the same share of zeros: {grid.known[0]:.2%}."
    return "Not shown by depth: the report does not name the blocks of the layers. The table of pruned layers has all."


def _why_no_errors(report: PruningReport) -> str:
    if any(layer.error is not None for layer in report.layers):
        return "The table of pruned layers has the errors of their outputs, which cannot be shown by depth."
    return (
        f"Not available. {method_of(report.config).partition(',')[0]} collects no Gram matrix of the inputs, without "
        "which the error cannot be computed, or several processes hold the rows of each matrix. Methods that collect "
        "one, such as sparsegpt and admm, report it."
    )


def _block_errors(report: PruningReport) -> str:
    if any(layer.part for layer in report.layers):
        return (
            "The recovery has trained the parts of each block toward their dense outputs, on inputs from the dense "
            "block. These are the errors of their outputs on held-out batches, before and after the training."
        )
    return "Errors of whole blocks are not available: only the recovery \u201creconstruct\u201d measures them."


def _has(report: PruningReport, choice: str, neutral: str) -> bool:
    found = report.config.get(choice)
    return isinstance(found, Mapping) and found.get("name") != neutral


def _layers_table(report: PruningReport) -> Table:
    rows = report.rows()
    shows_errors = any(layer.error is not None for layer in report.layers)
    shows_notes = any(layer.remarks or layer.siblings for layer in report.layers)
    number = "number"
    headings = [Column("Layer", "code"), Column("Shape", number), Column("Weights", number), Column("Target", number)]
    headings += [
        Column("Zeros", number),
        *([Column("Error", number)] if shows_errors else []),
        Column("Tokens", number),
    ]
    headings += [Column("Note", "text")] if shows_notes else []
    return Table(headings, [_layer_row(name, layers, shows_errors, shows_notes) for name, layers in rows.items()])


def _layer_row(name: str, layers: Sequence[PrunedLayer], shows_errors: bool, shows_notes: bool) -> list[Cell]:
    size, error = sum(layer.size for layer in layers), mean_error(layers)
    target = sum(layer.target * layer.size for layer in layers) / size
    cells = [
        Cell(name),
        Cell(" \u00d7 ".join(map(str, layers[0].shape)), layers[0].size),
        Cell(f"{size:,}", size),
        Cell(text_range([layer.target for layer in layers], ".2%"), target),
        Cell(text_range([layer.sparsity for layer in layers], ".2%"), share_of_zeros(layers)),
    ]
    if shows_errors:
        cells.append(Cell("" if error is None else f"{error:.2%}", error))
    cells.append(Cell(text_range([layer.tokens for layer in layers], ","), layers[0].tokens))
    return [*cells, Cell(note_of(layers))] if shows_notes else cells


def _dense_table(report: PruningReport) -> Table | None:
    if not (groups := dense_by_reason(report)):
        return None
    headings = [
        Column("Why", "text"),
        Column("Matrices", "number"),
        Column("Parameters", "number"),
        Column("First", "code"),
    ]
    rows = [
        [
            Cell(group.why),
            Cell(f"{len(group.matrices):,}", len(group.matrices)),
            Cell(f"{group.size:,}", group.size),
            Cell(group.matrices[0].name),
        ]
        for group in groups
    ]
    return Table(headings, rows)


def _experts_table(report: PruningReport) -> Table:
    names = ("Matrices", "Fewest tokens", "Median", "Most", "Pooled")
    headings = [Column("Block", "code"), *(Column(name, "number") for name in names)]
    rows = []
    for each in expert_tokens(report):
        values = (each.experts, each.least, each.median, each.most, each.pooled)
        rows.append([Cell(each.name), *(Cell(f"{value:,.0f}", value) for value in values)])
    return Table(headings, rows)


def _zero_shot(run: Run | None) -> Table | None:
    if run is None or not run.zero_shot:
        return None
    headings = [Column("Task"), Column("Metric"), Column("Pruned model", "number")]
    rows = [
        [Cell(task), Cell(metric), Cell(f"{value:.2%}", value)]
        for task, results in run.zero_shot.items()
        for metric, value in results.items()
        if 0 <= value <= 1 and not metric.endswith("_stderr")
    ]
    return Table(headings, rows)


def _made_with(report: PruningReport) -> list[tuple[str, str]]:
    """Return the data, the settings, the time of each stage, and the versions."""
    run = report.run
    data = [("calibration data", run.calibration), ("measured on", run.data)] if run else []
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.seconds.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    found = [*data, *settings(report.config), ("time", stages), ("versions", versions)]
    return [(name.replace("_", " "), value) for name, value in found if value]
