"""Figures of a report, drawn on Matplotlib axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from wanda_lightning.report.facts import (
    ExpertTokens,
    Grid,
    Weights,
    error_grid,
    expert_tokens,
    part_grid,
    sparsity_grid,
    weights_by_kind,
)
from wanda_lightning.report.labels import Point, label_ends, label_points, write
from wanda_lightning.report.pruning_report import PruningReport, Training
from wanda_lightning.report.theme import ACCENT, INK, LINE, MUTED, SERIES, SURFACE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES = 8  # more cannot be told apart by their colors
_LEAST_RANGE = 0.1  # of the sparsities that colors span, so that nearly uniform ones look nearly uniform


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        name: A short name, unique on a page.
        title: What it shows.
        height: In pixels.
        draw: Draws it on axes of the given width in pixels.
    """

    name: str
    title: str
    height: int
    draw: Callable[[Axes, int], None]


def plots_of(report: PruningReport) -> list[Plot]:
    """Return the figures for which the report has numbers."""
    plots = []
    sparsity, errors, parts = sparsity_grid(report), error_grid(report), part_grid(report)
    if len(set(sparsity.known)) > 1:
        plots.append(_heat_map("sparsity", "Zeros by layer", sparsity, _LEAST_RANGE))
    if len(errors.blocks) > 1 and errors.known:
        plots.append(_errors("error", "Relative error of the layers' outputs", errors))
    if len(parts.blocks) > 1:
        plots.append(_errors("parts", "Relative error of attention and MLP, before and after their training", parts))
    plots.append(_weights(weights_by_kind(report)))
    experts = expert_tokens(report)
    if len(experts) > 1:
        plots.append(Plot("experts", "Calibration tokens per expert", 260, lambda axes, _: draw_experts(axes, experts)))
    if (training := report.training) and len(training.passes) > 1:
        plots.append(Plot("training", "Loss of the recovery", 240, lambda axes, _: draw_training(axes, training)))
    return plots


def _heat_map(name: str, title: str, grid: Grid, least_range: float = 0.0) -> Plot:
    height = 60 + 24 * len(grid.kinds)
    return Plot(name, title, height, lambda axes, width: draw_heat_map(axes, grid, width, least_range))


def _errors(name: str, title: str, grid: Grid) -> Plot:
    if len(grid.kinds) > _MOST_LINES:
        return _heat_map(name, title, grid)
    return Plot(name, title, 300, lambda axes, _: draw_lines(axes, grid))


def _weights(bars: Sequence[Weights]) -> Plot:
    return Plot("weights", "Where the zeros are", 50 + 22 * len(bars), lambda axes, _: draw_weights(axes, bars))


def color_range(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return the values of the palest and the strongest color: those of the data, or a wider range inside [0, 1].

    >>> color_range([0.2, 0.7], 0.1)
    (0.2, 0.7)
    >>> [round(end, 3) for end in color_range([0.49, 0.51], 0.1)]
    [0.45, 0.55]
    """
    low, high = min(values), max(values)
    if high - low >= least:
        return low, high
    low = min(max(0.0, (low + high - least) / 2), 1 - least)
    return low, low + least


def draw_heat_map(axes: Axes, grid: Grid, width: int, least_range: float = 0.0) -> None:
    """Draw a cell for each layer: the larger the value, the stronger its color.

    Args:
        axes: Where to draw.
        grid: The values.
        width: Of the figure, in pixels.
        least_range: The least difference between the values of the palest and the strongest color.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    low, high = color_range(grid.known, least_range)
    cells = [
        (row, column, value, 0.12 + 0.88 * (value - low) / (high - low) if high > low else 0.5)
        for row, values in enumerate(grid.values)
        for column, value in enumerate(values)
        if value is not None
    ]
    x_gap, y_gap = len(grid.blocks) / width, 0.05  # about a pixel
    corners = [
        [
            (column + x, row + y)
            for x, y in ((x_gap, y_gap), (1 - x_gap, y_gap), (1 - x_gap, 1 - y_gap), (x_gap, 1 - y_gap))
        ]
        for row, column, _, _ in cells
    ]
    colors = [(*to_rgb(ACCENT), strength) for _, _, _, strength in cells]
    axes.add_collection(PolyCollection(corners, facecolors=colors, linewidths=0))
    if width >= 26 * len(grid.blocks):
        for row, column, value, strength in cells:
            ink = SURFACE if strength > 0.72 else INK
            axes.text(column + 0.5, row + 0.52, f"{100 * value:.0f}", color=ink, ha="center", va="center", size=10)
    axes.set(xlim=(0, len(grid.blocks)), ylim=(len(grid.kinds), 0))
    axes.set_yticks([row + 0.5 for row in range(len(grid.kinds))], grid.labels)
    _number_blocks(axes, grid, 0.5, f"block, from {low:.1%} (pale) to {high:.1%} (strong)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _number_blocks(axes: Axes, grid: Grid, center: float, label: str = "block") -> None:
    """Number the blocks, each at its number plus `center`, and mark where another list of blocks begins."""
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if len(grid.blocks) <= 16 * step), 1000)
    numbers = range(0, len(grid.blocks), step)
    axes.set_xticks([number + center for number in numbers], [str(number) for number in numbers])
    axes.set_xlabel(label)
    for name, first in grid.stacks.items() if len(grid.stacks) > 1 else ():
        start = first + center - 0.5
        if first:
            axes.axvline(start, color=LINE, linewidth=1)
        axes.text(start + 0.05, 1.01, name, transform=axes.get_xaxis_transform(), size=10, color=MUTED)


def draw_lines(axes: Axes, grid: Grid) -> None:
    """Draw a line over the blocks for each kind, in percent, with its name at the right end.

    A kind that is measured before and after something has two lines of one color; the first is dashed.
    """
    names = [label.removesuffix(" before").removesuffix(" after") for label in grid.labels]
    colors = dict(zip(dict.fromkeys(names), SERIES, strict=False))
    ends = []
    for label, name, values in zip(grid.labels, names, grid.values, strict=True):
        known = [(column, 100 * value) for column, value in enumerate(values) if value is not None]
        if not known:
            continue
        style = "--" if label.endswith(" before") else "-"
        axes.plot(*zip(*known, strict=True), color=colors[name], linestyle=style, linewidth=1.6)
        ends.append((known[-1][1], label, colors[name]))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    _number_blocks(axes, grid, 0)
    _percent(axes.yaxis)
    _quiet(axes)
    label_ends(axes, ends)


def draw_weights(axes: Axes, bars: Sequence[Weights]) -> None:
    """Draw a bar for each kind of matrix: zeros, other weights of pruned layers, and weights left dense."""
    rows = range(len(bars))
    start = [0.0] * len(bars)
    for name, color, alpha in (("zeros", ACCENT, 1.0), ("kept", ACCENT, 0.35), ("dense", MUTED, 0.3)):
        sizes = [getattr(bar, name) for bar in bars]
        axes.barh(rows, sizes, 0.68, left=start, color=color, alpha=alpha, linewidth=0)
        start = [left + size for left, size in zip(start, sizes, strict=True)]
    for row, bar in enumerate(bars):
        text = (
            f"{_short(bar.size)} dense"
            if bar.dense == bar.size
            else f"{bar.zeros / bar.size:.1%} of {_short(bar.size)}"
        )
        write(axes, text, (start[row], row), (6, 0), color=MUTED)
    axes.set(ylim=(len(bars) - 0.4, -0.6), xlim=(0, max(start)))
    axes.set_yticks(rows, [bar.name for bar in bars])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _short(size: int) -> str:
    unit, suffix = next((each for each in ((1e9, " B"), (1e6, " M"), (1e3, " K")) if size >= each[0]), (1, ""))
    return f"{size / unit:.3g}{suffix}"


def draw_experts(axes: Axes, experts: Sequence[ExpertTokens]) -> None:
    """Draw the median of the experts' tokens in each block, and the range from the least to the most."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    columns = range(len(experts))
    least, middle, most = ([getattr(each, name) for each in experts] for name in ("least", "median", "most"))
    axes.fill_between(columns, least, most, color=ACCENT, alpha=0.2, linewidth=0)
    axes.plot(columns, middle, color=ACCENT, linewidth=1.8)
    if max(most) > 10 * max(1, min(least)):
        axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block with experts")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    _quiet(axes)
    label_ends(axes, [(most[-1], "most", MUTED), (middle[-1], "median", ACCENT), (least[-1], "fewest", MUTED)])


def draw_training(axes: Axes, training: Training) -> None:
    """Draw the losses of each pass of a recovery of the whole model."""
    from matplotlib.ticker import MaxNLocator

    ends = []
    for name, key, color in (("trained on", "loss", MUTED), ("held out", "held_out", ACCENT)):
        losses = ((number, getattr(each, key)) for number, each in enumerate(training.passes))
        known = [(number, loss) for number, loss in losses if loss is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, linewidth=1.8, marker="o", markersize=4)
            ends.append((known[-1][1], name, color))
    axes.set_xlabel("pass over the samples")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02, y=0.12)
    _quiet(axes)
    label_ends(axes, ends)


def draw_points(axes: Axes, points: Sequence[Point], dense: float | None, xlabel: str) -> None:
    """Draw labeled points, and a line at the value of the dense model. An axis with large ratios is logarithmic."""
    _scale_axis(axes, "x", [point.x for point in points])
    _scale_axis(axes, "y", [*(point.y for point in points), *([] if dense is None else [dense])])
    for point in points:
        axes.plot(point.x, point.y, "o", color=point.color, markersize=7)
    if dense is not None:
        axes.axhline(dense, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.margins(x=0.08, y=0.14)
    axes.set_xlabel(xlabel)
    _quiet(axes)
    if dense is not None:
        label_ends(axes, [(dense, "dense", MUTED)])
    label_points(axes, points)


def _scale_axis(axes: Axes, name: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic if its values differ by more than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(values) <= 0 or max(values) <= 10 * min(values):
        return
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))


def _quiet(axes: Axes) -> None:
    """Leave only what helps to read the values: light lines, and no frame."""
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
