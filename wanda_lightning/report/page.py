"""A report as one HTML file that needs no network, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from os import PathLike
from pathlib import PurePath
from typing import Any

from wanda_lightning.checks import check_report_path, require_report_extra
from wanda_lightning.files import whole_file
from wanda_lightning.report.facts import (
    Grid,
    choices_of,
    dense_by_reason,
    expert_tokens,
    method_in_words,
    method_of,
    settings,
    sparsity_grid,
)
from wanda_lightning.report.figures import to_array, to_png, to_svg
from wanda_lightning.report.metrics import METRICS
from wanda_lightning.report.plots import Plot, plots_of
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.report.tables import dense_table, experts_table, layers_table, zero_shot_table
from wanda_lightning.report.theme import COLORS
from wanda_lightning.report.words import continuation, count, counted, duration

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
        to_png(plots_of(report), temporary, f"{title_of(report)}: {method_in_words(report.config)}")


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
    return {
        "title": title_of(report),
        "report": report,
        "run": report.run,
        "command": report.run.command.split(" ") if report.run else [],
        "continuation": continuation,
        "verdict": _verdict(report),
        "tile_list": _tiles(report),
        "plots": {name: figures.get(name) for name in ("weights", "sparsity", "error", "parts", "experts", "training")},
        "allocation": _allocation(sparsity_grid(report), report),
        "no_errors": _why_no_errors(report),
        "block_errors": _block_errors(report),
        "recovered": _has(report, "recovery", "NoRecovery"),
        "experts": experts_table(report),
        "pooled": sum(each.pooled for each in experts),
        "layers": layers_table(report),
        "dense": dense_table(report),
        "dense_groups": dense_by_reason(report),
        "zero_shot": zero_shot_table(report),
        "made_with": _made_with(report),
    }


def _verdict(report: PruningReport) -> str:
    """Say in two sentences what was done and what it cost."""
    text = (
        f"Pruned with {method_in_words(report.config)} in {duration(report.total_seconds)}: {report.sparsity:.2%} of "
        f"the weights in {counted(len(report.layers), 'layer')} are zero, {report.model_sparsity:.2%} of all "
        f"{count(report.parameters)} parameters."
    )
    run = report.run
    if run is None or run.after is None:
        return f"{text} The effect on the predictions was not measured."
    data, _, amount = run.data.partition(", ")
    metric = METRICS[run.metric]
    subject = metric.title + (f" on {data}" if data else "") + (f" ({amount})" if amount else "")
    before, after = metric.text(run.before), metric.text(run.after)
    if run.before is None or not isfinite(run.before + run.after):
        dense = "" if run.before is None else f" ({before} before)"
        return f"{text} {subject} is {after} afterward{dense}."
    if before == after:
        return f"{text} {subject} stayed at {after}."
    return f"{text} {subject} {'rose' if run.after > run.before else 'fell'} from {before} to {after}."


def _tiles(report: PruningReport) -> list[Tile]:
    method, others = method_of(report.config)
    tiles = [
        Tile("Zeros in pruned layers", f"{report.sparsity:.2%}", f"{report.model_sparsity:.2%} of the whole model"),
        Tile("Time to prune", duration(report.total_seconds), _slowest(report)),
        Tile("Method", method, others),
    ]
    if (run := report.run) and run.metric and run.after is not None:
        metric = METRICS[run.metric]
        moved = [f"dense {metric.text(run.before)}", metric.change(run.before, run.after)]
        detail = "" if run.before is None else ", ".join(filter(None, moved))
        tiles.insert(1, Tile(metric.title, metric.text(run.after), detail))
    return tiles


def _slowest(report: PruningReport) -> str:
    stages = [(stage, seconds) for stage, seconds in report.seconds.items() if seconds >= 0.05 * report.total_seconds]
    return ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in stages) if len(stages) > 1 else ""


def _allocation(grid: Grid, report: PruningReport) -> str:
    if len(set(grid.known)) == 1:
        return f"Every layer has the same share of zeros: {grid.known[0]:.2%}."
    return "Not shown by depth: no blocks of these layers are known. The table of pruned layers has all of them."


def _why_no_errors(report: PruningReport) -> str:
    if any(layer.error is not None for layer in report.layers):
        return "The table of pruned layers has the errors of their outputs, which cannot be shown by depth."
    return (
        f"Not available. {choices_of(report.config).partition(',')[0]} collects no Gram matrix of the inputs, without "
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


def _made_with(report: PruningReport) -> list[tuple[str, str]]:
    """Return the data, the settings, the time of each stage, and the versions."""
    run = report.run
    data = [("calibration data", run.calibration), ("measured on", run.data)] if run else []
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.seconds.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    found = [*data, *settings(report.config), ("time", stages), ("versions", versions)]
    return [(name.replace("_", " "), value) for name, value in found if value]
