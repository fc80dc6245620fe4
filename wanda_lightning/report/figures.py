"""Figures of a report, drawn with Matplotlib in one style: for its page, and as PNG."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from math import isnan, nan
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_lightning.common.checks import require_extra
from wanda_lightning.common.wording import abbreviated
from wanda_lightning.models import SkipReason
from wanda_lightning.report.records import Layers, PrunedLayer, ReportData, grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS: Mapping[str, str] = {
    **{
        "ink": "#1f2530",
        "muted": "#66707d",
        "line": "#dde2e8",
        "surface": "#fefefd",
        "accent": "#2c68ad",
    },
    **{"series-1": "#2d6ab0", "series-2": "#c8692f", "series-3": "#3a8a5a", "series-4": "#93509b"},
    **{"series-5": "#857021", "series-6": "#2f8f9d", "series-7": "#bb4a63", "series-8": "#6c7480"},
}
"""The colors of the light theme, which all differ: in the page, CSS finds them in figures and replaces them."""
INK, MUTED, LINE, SURFACE, ACCENT, *SERIES = COLORS.values()
_STYLE = Path(__file__).with_name("templates") / "figures.mplstyle"
_LABEL: dict[str, Any] = {
    "xytext": (6, 0),
    "textcoords": "offset points",
    "va": "center",
    "annotation_clip": False,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_LINE = 0.065  # height of a line of text, as a fraction of axes with lines

_GROUP = re.compile(r"(^|\.)group\d+$")  # each group of a grouped convolution is a layer
_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


class Grid:
    """Values by kind of layer (rows) and block (columns), in order of first occurrence; NaN if unknown."""

    def __init__(self, cells: Mapping[tuple[str, str], float | None]) -> None:
        # rows, such as `self_attn.q_proj`.
        self.kinds = list(dict.fromkeys(kind for kind, _ in cells))
        self.blocks = list(dict.fromkeys(block for _, block in cells))  # columns
        found = {cell: nan if value is None else value for cell, value in cells.items()}
        self.values = [
            [found.get((kind, block), nan) for block in self.blocks] for kind in self.kinds
        ]
        self.known = [value for value in cells.values() if value is not None]
        # The different ones as text.
        self.shown = list(dict.fromkeys(f"{value:.1%}" for value in self.known))
        self.labels = shortest_ends([kind.replace(".*", "") for kind in self.kinds])
        lists = [block.rpartition(".")[0] for block in self.blocks]  # such as `encoder.block`
        # With their first columns.
        self.stacks = {name: lists.index(name) for name in dict.fromkeys(lists)}
        self.height = 60 + 24 * len(self.kinds)  # of a heat map, in pixels


def layer_grid(report: ReportData, field: str) -> Grid:
    """Return the sparsity or the error of the layers of each kind in each block."""
    cells = grouped(report.layers, lambda layer: (_kind_in_block(layer), layer.block))
    return Grid({cell: getattr(Layers(layers), field) for cell, layers in cells.items() if cell[0]})


def _kind_in_block(layer: PrunedLayer) -> str:
    """Return the name of a layer within its block; empty if it lies in no block."""
    name = layer.siblings or layer.name
    block = f"{layer.block}."
    return (
        _GROUP.sub("", name.removeprefix(block)) if layer.block and name.startswith(block) else ""
    )


def _kind_in_model(layer: PrunedLayer) -> str:
    kind = _kind_in_block(layer) or _NUMBER.sub(r"\1*", _GROUP.sub("", layer.name))
    return kind.replace(".*", "") or kind


def shortest_ends(names: Sequence[str]) -> list[str]:
    """Return the shortest end of each name, such as `q_proj`, that is not the end of another one."""
    ends = {
        name: [name.split(".", cuts)[-1] for cuts in range(name.count("."), -1, -1)]
        for name in names
    }
    uses = Counter(end for each in ends.values() for end in each)
    return [next((end for end in ends[name] if uses[end] == 1), name) for name in names]


def weights_by_kind(report: ReportData) -> list[tuple[str, int, int, int]]:
    """Return (kind of matrix, zeros, other pruned weights, weights left dense), largest first."""
    pruned = grouped(report.layers, _kind_in_model)
    found = []
    for name, layers in zip(shortest_ends(list(pruned)), pruned.values(), strict=True):
        pruned_away = sum(layer.zeros for layer in layers)
        found.append((name, pruned_away, Layers(layers).size - pruned_away, 0))
    for reason, matrices in grouped(report.skipped, lambda matrix: matrix.reason).items():
        if reason is not SkipReason.TIED:  # its weights are those of another matrix
            found.append(
                (reason.value.replace("_", " "), 0, 0, sum(matrix.size for matrix in matrices))
            )
    if (rest := report.parameters - sum(sum(numbers) for _, *numbers in found)) > 0:
        found.append(("norms, biases", 0, 0, rest))
    return sorted(found, key=lambda each: -sum(each[1:]))


@dataclass(frozen=True)
class Plot:
    """One figure, of a height in pixels; `draw` draws it on axes of a width in pixels."""

    name: str
    title: str
    height: int
    draw: Callable[[Axes, int], None]


def plots_of(report: ReportData) -> list[Plot]:
    """Return the figures for which the report has numbers."""
    require_extra("report", "matplotlib", purpose="Figures")
    sparsity = layer_grid(report, "sparsity")
    errors = layer_grid(report, "error")
    bars = weights_by_kind(report)
    plots = []
    # Colors span at least 10 %, so that nearly uniform sparsities look nearly uniform.
    if len(sparsity.shown) > 1:
        plots.append(
            Plot(
                "sparsity",
                "Zeros by layer",
                sparsity.height,
                partial(_draw_heat_map, sparsity, 0.1),
            )
        )
    if len(errors.blocks) > 1 and errors.known:
        many = len(errors.kinds) > len(SERIES)  # more lines than colors
        draw = partial(_draw_heat_map, errors, 0.0) if many else partial(_draw_errors, errors)
        plots.append(
            Plot(
                "error",
                "Relative error of the layers' outputs",
                errors.height if many else 300,
                draw,
            )
        )
    plots.append(
        Plot("weights", "Where the zeros are", 50 + 22 * len(bars), partial(_draw_weights, bars))
    )
    return plots


def _draw_heat_map(grid: Grid, least_range: float, axes: Axes, width: int) -> None:
    """Draw a cell for each layer: the larger the value, the stronger its color, over at least a range inside [0, 1]."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    low = min(grid.known)
    high = max(grid.known)
    if high - low < least_range:
        low = min(max(0.0, (low + high - least_range) / 2), 1 - least_range)
        high = low + least_range
    strengths = LinearSegmentedColormap.from_list(
        "strengths", [to_rgba(ACCENT, 0.12), to_rgba(ACCENT, 1.0)]
    )
    edges = (np.arange(size + 1) - 0.5 for size in (len(grid.blocks), len(grid.kinds)))
    axes.pcolormesh(
        *edges,
        np.array(grid.values),
        cmap=strengths,
        vmin=low,
        vmax=high,
        edgecolors=SURFACE,
        linewidth=1,
    )
    for row, values in enumerate(grid.values if width >= 26 * len(grid.blocks) else ()):
        for column, value in enumerate(values):
            ink = SURFACE if value - low > 0.64 * (high - low) else INK
            text = "" if isnan(value) else f"{100 * value:.0f}"
            axes.text(column, row + 0.02, text, color=ink, ha="center", va="center", size=10)
    axes.set(
        ylim=(len(grid.kinds) - 0.5, -0.5), yticks=range(len(grid.kinds)), yticklabels=grid.labels
    )
    axes.spines[:].set_visible(False)
    _number_blocks(axes, grid, f"block, from {low:.1%} (pale) to {high:.1%} (strong)")


def _number_blocks(axes: Axes, grid: Grid, label: str = "block") -> None:
    """Number the blocks, and mark where another list of blocks begins."""
    axes.locator_params(axis="x", nbins=16, integer=True)
    axes.set_xlabel(label)
    for name, first in grid.stacks.items() if len(grid.stacks) > 1 else ():
        axes.axvline(first - 0.5, color=LINE, linewidth=1)
        axes.text(
            first - 0.45, 1.01, name, transform=axes.get_xaxis_transform(), size=10, color=MUTED
        )


def _draw_errors(grid: Grid, axes: Axes, _: int) -> None:
    """Draw a line over the blocks for each kind, in percent."""
    for label, color, values in zip(grid.labels, SERIES, grid.values, strict=False):
        known = [(block, 100 * value) for block, value in enumerate(values) if not isnan(value)]
        axes.plot(*zip(*known, strict=True), label=label, color=color)
    axes.set(ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:g}%")
    _label_lines(axes)
    _number_blocks(axes, grid)


def _draw_weights(bars: Sequence[tuple[str, int, int, int]], axes: Axes, _: int) -> None:
    """Draw a bar for each kind of matrix: zeros, other weights of pruned layers, and weights left dense."""
    for row, (_name, zeros, kept, dense) in enumerate(bars):
        axes.barh(row, zeros, 0.68, color=ACCENT, linewidth=0)
        axes.barh(row, kept, 0.68, left=zeros, color=ACCENT, alpha=0.35, linewidth=0)
        axes.barh(row, dense, 0.68, left=zeros + kept, color=MUTED, alpha=0.3, linewidth=0)
        size = zeros + kept + dense
        short = abbreviated(size, (" B", " M", " K"))
        text = f"{short} dense" if dense == size else f"{zeros / size:.1%} of {short}"
        axes.annotate(text, (size, row), color=MUTED, size=11, **_LABEL)
    axes.set(
        ylim=(len(bars) - 0.4, -0.6), xlim=(0, max(sum(numbers) for _, *numbers in bars)), xticks=[]
    )
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.spines[:].set_visible(False)


def _label_lines(axes: Axes) -> None:
    """Write the labels of lines next to their right ends, moved apart where they would overlap; add a light grid."""
    axes.grid(axis="y")
    axes.autoscale_view()
    to_height = axes.transData + axes.transAxes.inverted()
    lines: list[Any] = axes.get_legend_handles_labels()[0]
    ends = sorted(
        ((to_height.transform((0, line.get_ydata()[-1]))[1], line) for line in lines),
        key=itemgetter(0),
    )
    place = 0.0
    for rank, (end, line) in enumerate(ends, start=1):
        place = min(max(place, end), 1 - _LINE * (len(ends) - rank))
        axes.annotate(
            line.get_label(),
            (1, place),
            xycoords="axes fraction",
            color=line.get_color(),
            size=11,
            **_LABEL,
        )
        place += _LINE


def to_svg(plot: Plot, width: int) -> str:
    """Return a figure as an SVG element, in whose styles the page replaces the colors and the font."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Ids of its own.
    with (
        mpl.rc_context({"svg.hashsalt": f"{plot.name}-{width}"}, _STYLE),
        StringIO() as file,
    ):
        figure = Figure((width / 72, plot.height / 72))
        plot.draw(figure.add_subplot(), width)
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
        _, start, content = file.getvalue().partition("<svg ")
    return f'{start}role="img" aria-label="{plot.title}" {content}'


def to_figure(plots: Sequence[Plot], title: str = "", width: int = 900) -> Figure:
    """Return plots below each other, with their titles, as one figure of Matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(fname=_STYLE):
        heights = [plot.height + 50 for plot in plots]
        figure = Figure((width / 72, (sum(heights) + 50) / 72))
        figure.suptitle(title, x=0.02, ha="left", size=14, weight="bold")
        rows = figure.subfigures(len(plots), 1, height_ratios=heights, squeeze=False)
        for plot, part in zip(plots, rows[:, 0], strict=True):
            part.suptitle(plot.title, x=0.02, ha="left", size=12)
            plot.draw(part.add_subplot(), width)
    return figure
