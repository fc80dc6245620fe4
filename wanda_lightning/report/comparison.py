"""Several prunings side by side: what each costs, and what it leaves of the model's quality."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from wanda_lightning.checks import check_report_path
from wanda_lightning.files import whole_file
from wanda_lightning.report.facts import method_in_words
from wanda_lightning.report.figures import to_png
from wanda_lightning.report.labels import Point
from wanda_lightning.report.metrics import METRICS
from wanda_lightning.report.page import drawn, title_of, write_page
from wanda_lightning.report.plots import Plot, draw_points
from wanda_lightning.report.pruning_report import REPORT_NAME, PruningReport
from wanda_lightning.report.tables import Cell, Column, Table, numbers
from wanda_lightning.report.theme import SERIES
from wanda_lightning.report.words import counted, duration


def read_reports(paths: Iterable[str | Path]) -> dict[str, PruningReport]:
    """Read reports, and name each after what tells its path from the others.

    Args:
        paths: Files, or folders with a `pruning_report.json`.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not the report of a pruning.
    """
    files = (Path(path) / REPORT_NAME if Path(path).is_dir() else Path(path) for path in paths)
    found = {file: _read(file) for file in files}
    return dict(zip(_names(list(found)), found.values(), strict=True))


def _read(path: Path) -> PruningReport:
    if path.name == REPORT_NAME and not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {REPORT_NAME}. Give a folder of prune --save or report_dir.")
    try:
        return PruningReport.from_json(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the report of a pruning. Give the {REPORT_NAME} that prune --save or report_dir wrote."
        ) from error


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ, without what all of them end with."""
    parts = [path.parent.parts or (".",) if path.name == REPORT_NAME else path.with_suffix("").parts for path in paths]
    while len({each[-1] for each in parts}) == 1 < len(parts) and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    longest = max(map(len, parts))
    ends = (["/".join(each[-length:]) for each in parts] for length in range(1, longest + 1))
    return next((names for names in ends if len(set(names)) == len(names)), [str(path) for path in paths])


@dataclass(frozen=True)
class Group:
    """Prunings whose results can be compared: of the same model, measured in the same way.

    Attributes:
        title: The model, and the data on which it was measured.
        metric: What was measured; empty if nothing was.
        reports: The prunings by name.
    """

    title: str
    metric: str
    reports: Mapping[str, PruningReport]

    @property
    def dense(self) -> float | None:
        """The result of the dense model; None if it is not known, or differs."""
        found = {report.run.before for report in self.reports.values() if report.run}
        return found.pop() if len(found) == 1 else None


def groups_of(reports: Mapping[str, PruningReport]) -> list[Group]:
    """Group prunings by model and data; those without results come last."""
    groups: dict[tuple[str, str, str], dict[str, PruningReport]] = {}
    for name, report in reports.items():
        run = report.run
        is_measured = run is not None and run.after is not None
        key = (run.model, run.data, run.metric) if run is not None and is_measured else ("", "", "")
        groups.setdefault(key, {})[name] = report
    ordered = sorted(groups.items(), key=lambda item: not item[0][2])
    return [Group(_title(members, data, metric), metric, members) for (_, data, metric), members in ordered]


def _title(members: Mapping[str, PruningReport], data: str, metric: str) -> str:
    if not metric:
        return "Without results"
    return ", ".join(filter(None, (title_of(next(iter(members.values()))), data)))


def plots_of_group(number: int, group: Group) -> list[Plot]:
    """Return the results against the time, and against the sparsity; none if there are no results."""
    if not group.metric:
        return []
    metric = METRICS[group.metric]
    name = metric.title + (", in percent," if metric.is_share else "")
    return [
        _plot(f"time-{number}", f"{name} against the time to prune", group, "seconds"),
        _plot(f"zeros-{number}", f"{name} against the zeros in pruned layers", group, "zeros"),
    ]


def _plot(name: str, title: str, group: Group, against: str) -> Plot:
    scale, points = METRICS[group.metric].scale, []
    for (label, report), color in zip(group.reports.items(), cycle(SERIES), strict=False):
        assert report.run is not None
        assert report.run.after is not None
        x = report.total_seconds if against == "seconds" else 100 * report.sparsity
        points.append(Point(label, x, scale * report.run.after, color))
    dense = None if group.dense is None else scale * group.dense
    axis = {"seconds": "seconds to prune", "zeros": "zeros in pruned layers, in percent"}[against]
    return Plot(name, title, 340, lambda axes, _: draw_points(axes, points, dense, axis))


def comparison_table(group: Group) -> Table:
    """Return a row for each pruning."""
    headings = [Column("Pruning", is_code=True), Column("Method", is_long=True), *numbers("Zeros", "Of the model")]
    if group.metric:
        headings += numbers(f"Dense {group.metric}", f"Pruned {group.metric}", "Change")
    headings += numbers("Time")
    return Table(headings, [_row(name, report, group.metric) for name, report in group.reports.items()])


def _row(name: str, report: PruningReport, metric: str) -> list[Cell]:
    cells = [Cell(name), Cell(method_in_words(report.config))]
    cells += [Cell(f"{value:.2%}", value) for value in (report.sparsity, report.model_sparsity)]
    if metric and (run := report.run) is not None:
        cells += [Cell(METRICS[metric].text(value), value) for value in (run.before, run.after)]
        moved = None if run.before is None or run.after is None else run.after - run.before
        cells.append(Cell(METRICS[metric].change(run.before, run.after), moved))
    return [*cells, Cell(duration(report.total_seconds), report.total_seconds)]


def write_comparison(reports: Mapping[str, PruningReport], path: str | Path) -> None:
    """Write a page (.html) that compares prunings, or its figures (.png)."""
    groups = groups_of(reports)
    plots = [plots_of_group(number, group) for number, group in enumerate(groups)]
    title = f"{counted(len(reports), 'pruning')} compared"
    if check_report_path(path) == ".html":
        write_page(path, "comparison.html", _content(title, groups, plots))
        return
    if not any(plots):
        raise ValueError(f"report must be a page, since no pruning has results to draw, but it is {str(path)!r}.")
    with whole_file(path) as temporary:
        to_png([plot for each in plots for plot in each], temporary, title)


def _content(title: str, groups: Sequence[Group], plots: Sequence[Sequence[Plot]]) -> dict[str, Any]:
    sections = [
        {
            "title": group.title,
            "table": comparison_table(group),
            "plots": list(zip(each, drawn(each).values(), strict=True)),
            "commands": _commands(group),
            "is_measured": bool(group.metric),
        }
        for group, each in zip(groups, plots, strict=True)
    ]
    return {"title": title, "sections": sections, "count": sum(bool(group.metric) for group in groups)}


def _commands(group: Group) -> list[tuple[str, list[str]]]:
    return [
        (name, report.run.command.split(" "))
        for name, report in group.reports.items()
        if report.run and report.run.command
    ]
