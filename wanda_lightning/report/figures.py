"""Figures of a report, drawn with Matplotlib in one style: for its page, and as PNG."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from io import StringIO
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wanda_lightning.common.aliases import Kwargs
from wanda_lightning.common.checks import require_extra
from wanda_lightning.common.grouping import grouped
from wanda_lightning.common.wording import abbreviated
from wanda_lightning.models import SkipReason
from wanda_lightning.report.records import Layers, PrunedLayer, ReportData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "ink": "#1f2530",
    "muted": "#66707d",
    "line": "#dde2e8",
    "surface": "#fefefd",
    "accent": "#2c68ad",
    "series-1": "#1a56d6",
    "series-2": "#d95f02",
    "series-3": "#12853f",
    "series-4": "#7b1fa2",
    "series-5": "#6b4c11",
    "series-6": "#0894b3",
    "series-7": "#e0218a",
    "series-8": "#3a414c",
}
"""The colors of the light theme, which all differ: in the page, CSS finds them in figures and replaces them."""
INK, MUTED, LINE, SURFACE, ACCENT, *SERIES = COLORS.values()
_STYLE = Path(__file__).with_name("templates") / "figures.mplstyle"
# A label begins six points to the right of what it names, and may lie outside of the axes.
_LABEL: Kwargs = {
    "xytext": (6, 0),
    "textcoords": "offset points",
    "va": "center",
    "annotation_clip": False,
}
# Without a date, so that equal reports have equal pages.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_WIDTH = 900  # of a picture, in pixels

_GROUP = re.compile(r"(^|\.)group\d+$")  # each group of a grouped convolution is a layer
_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")  # of a layer in a list


class Grid:
    """The sparsity or the error of the layers by kind (rows) and block (columns), as they occur; NaN if unknown."""

    def __init__(self, report: ReportData, field: str) -> None:
        # A layer outside of all blocks has no kind, and no place in the grid.
        layers = filter(_kind_in_block, report.layers)
        cells = grouped(layers, lambda layer: (_kind_in_block(layer), layer.block))
        self.kinds = list(dict.fromkeys(kind for kind, _ in cells))  # such as `self_attn.q_proj`
        self.blocks = list(dict.fromkeys(block for _, block in cells))  # such as `model.layers.0`
        values = {cell: getattr(Layers(layers), field) for cell, layers in cells.items()}
        known = {cell: value for cell, value in values.items() if value is not None}
        self.values = [
            [known.get((kind, block), nan) for block in self.blocks] for kind in self.kinds
        ]
        self.known = list(known.values())
        self.shown = list(dict.fromkeys(f"{value:.1%}" for value in self.known))  # different texts
        self.labels = shortest_ends([kind.replace(".*", "") for kind in self.kinds])
        # The first column of each list of blocks, such as `encoder.block`.
        self.stacks: dict[str, int] = {}
        for column, block in enumerate(self.blocks):
            self.stacks.setdefault(block.rpartition(".")[0], column)
        self.heat_map_height = 60 + 24 * len(self.kinds)  # in pixels


def _kind_in_block(layer: PrunedLayer) -> str:
    """Return the name of a layer within its block; empty if it lies in no block."""
    name = layer.siblings or layer.name
    prefix = f"{layer.block}."
    return _GROUP.sub("", name.removeprefix(prefix)) if name.startswith(prefix) else ""


def _kind_in_model(layer: PrunedLayer) -> str:
    """Return the kind of a layer without numbers; of one outside of all blocks, by its whole name."""
    kind = _kind_in_block(layer) or _NUMBER.sub(r"\1*", _GROUP.sub("", layer.name))
    return kind.replace(".*", "") or kind


def shortest_ends(names: Sequence[str]) -> list[str]:
    """Return the shortest end of each name, such as `q_proj`, that is not the end of another one."""
    uses = Counter(end for name in set(names) for end in _ends(name))
    return [next((end for end in _ends(name) if uses[end] == 1), name) for name in names]


def _ends(name: str) -> list[str]:
    """Return the ends of a name, shortest first: `c`, `b.c` and `a.b.c`."""
    return [name.split(".", cuts)[-1] for cuts in range(name.count("."), -1, -1)]


class Bar(NamedTuple):
    """The numbers of weights in matrices of one kind."""

    name: str
    zeros: int = 0
    kept: int = 0  # other weights of pruned matrices
    dense: int = 0  # weights of matrices that were not pruned

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.zeros + self.kept + self.dense


def weights_by_kind(report: ReportData) -> list[Bar]:
    """Return the weights of each kind of matrix, pruned or not, largest first."""
    pruned = grouped(report.layers, _kind_in_model)
    bars = []
    for name, group in zip(shortest_ends([*pruned]), pruned.values(), strict=True):
        layers = Layers(group)
        bars.append(Bar(name, layers.zeros, layers.size - layers.zeros))

    for reason, matrices in grouped(report.skipped, lambda matrix: matrix.reason).items():
        if reason is not SkipReason.TIED:  # its weights are counted with another matrix
            size = sum(matrix.size for matrix in matrices)
            bars.append(Bar(reason.value.replace("_", " "), dense=size))

    rest = report.parameters - sum(bar.size for bar in bars)
    if rest > 0:
        bars.append(Bar("norms, biases", dense=rest))
    return sorted(bars, key=lambda bar: -bar.size)


class Plot(NamedTuple):
    """One figure, of a height in pixels; `draw` draws it on axes of a width in pixels."""

    name: str
    title: str
    height: int
    draw: Callable[[Axes, int], None]


def plots_of(report: ReportData) -> list[Plot]:
    """Return the figures for which the report has numbers."""
    require_extra("report", "matplotlib", purpose="Figures")
    sparsity = Grid(report, "sparsity")
    errors = Grid(report, "error")
    plots = []
    if len(sparsity.shown) > 1:
        # Colors span at least 10 %, so that nearly uniform sparsities look nearly uniform.
        draw = partial(_draw_heat_map, sparsity, 0.1)
        plots.append(Plot("sparsity", "Zeros by layer", sparsity.heat_map_height, draw))

    if len(errors.blocks) > 1 and errors.known:
        draw = partial(_draw_errors, errors)
        height = 300
        if len(errors.kinds) > len(SERIES):  # more lines than colors
            draw = partial(_draw_heat_map, errors, 0.0)
            height = errors.heat_map_height
        plots.append(Plot("error", "Relative error of the layers' outputs", height, draw))

    bars = weights_by_kind(report)
    height = 50 + 22 * len(bars)
    return [*plots, Plot("weights", "Where the zeros are", height, partial(_draw_weights, bars))]


def _draw_heat_map(grid: Grid, least_range: float, axes: Axes, width: int) -> None:
    """Draw a cell for each layer: the larger the value, the stronger its color, over at least a range inside [0, 1]."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    low = min(grid.known)
    high = max(grid.known)
    if high - low < least_range:
        # Grow around the middle of the values, but not beyond 0 and 1.
        low = min(max(0.0, (low + high - least_range) / 2), 1 - least_range)
        high = low + least_range

    rows = len(grid.kinds)
    strengths = [to_rgba(ACCENT, 0.12), to_rgba(ACCENT, 1.0)]
    axes.pcolormesh(
        np.arange(-0.5, len(grid.blocks)),
        np.arange(-0.5, rows),
        grid.values,
        cmap=LinearSegmentedColormap.from_list("strengths", strengths),
        vmin=low,
        vmax=high,
        edgecolors=SURFACE,
        linewidth=1,
    )
    if width >= 26 * len(grid.blocks):  # else the cells are too narrow for numbers
        _write_percents(grid, low + 0.64 * (high - low), axes)
    axes.set(ylim=(rows - 0.5, -0.5), yticks=range(rows), yticklabels=grid.labels)
    axes.spines[:].set_visible(False)
    _number_blocks(axes, grid, f"block, from {low:.1%} (pale) to {high:.1%} (strong)")


def _write_percents(grid: Grid, strong: float, axes: Axes) -> None:
    """Write the value of each cell, in the color of the background where the color of the cell is strong."""
    for row, values in enumerate(grid.values):
        for column, value in enumerate(values):
            ink = SURFACE if value > strong else INK
            text = "" if isnan(value) else f"{100 * value:.0f}"
            axes.text(column, row + 0.02, text, color=ink, ha="center", va="center", size=10)


def _number_blocks(axes: Axes, grid: Grid, label: str = "block") -> None:
    """Number the blocks, and mark where another list of blocks begins."""
    axes.locator_params(axis="x", nbins=16, integer=True)
    axes.set_xlabel(label)
    if len(grid.stacks) == 1:
        return
    for name, first in grid.stacks.items():
        axes.axvline(first - 0.5, color=LINE, linewidth=1)
        place = axes.get_xaxis_transform()  # the height is a fraction of the axes
        axes.text(first - 0.45, 1.01, name, transform=place, size=10, color=MUTED)


def _draw_errors(grid: Grid, axes: Axes, _: int) -> None:
    """Draw a line over the blocks for each kind, in percent."""
    for label, color, values in zip(grid.labels, SERIES, grid.values, strict=False):
        known = {block: 100 * value for block, value in enumerate(values) if not isnan(value)}
        if known:
            axes.plot(list(known), list(known.values()), label=label, color=color)
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.grid(axis="y")
    # In the order in which the lines end.
    lines: Any = axes.get_legend_handles_labels()[0]
    lines.sort(key=lambda line: -line.get_ydata()[-1])
    axes.legend(handles=lines, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _number_blocks(axes, grid)


def _draw_weights(bars: Sequence[Bar], axes: Axes, _: int) -> None:
    """Draw a bar for each kind of matrix: zeros, other weights of pruned layers, and weights left dense."""
    for row, bar in enumerate(bars):
        pruned = bar.zeros + bar.kept
        axes.barh(row, bar.zeros, 0.68, color=ACCENT, linewidth=0)
        axes.barh(row, bar.kept, 0.68, bar.zeros, color=ACCENT, alpha=0.35, linewidth=0)
        axes.barh(row, bar.dense, 0.68, pruned, color=MUTED, alpha=0.3, linewidth=0)
        size = abbreviated(bar.size, (" B", " M", " K"))
        text = f"{bar.zeros / bar.size:.1%} of {size}" if pruned else f"{size} dense"
        axes.annotate(text, (bar.size, row), color=MUTED, size=11, **_LABEL)
    axes.set(ylim=(len(bars) - 0.4, -0.6), xlim=(0, bars[0].size), xticks=[])  # the largest
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.spines[:].set_visible(False)


def to_svg(plot: Plot, width: int) -> str:
    """Return a figure as an SVG element, in whose styles the page replaces the colors and the font."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The salt gives each figure of a page ids of its own, which are the same in each run.
    salt = {"svg.hashsalt": f"{plot.name}-{width}"}
    with mpl.rc_context(salt, _STYLE), StringIO() as file:
        figure = Figure((width / 72, plot.height / 72))
        plot.draw(figure.add_subplot(), width)
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
        # Without the declaration of XML before the element, which must not stand inside of a page.
        _, start, content = file.getvalue().partition("<svg ")
    return f'{start}role="img" aria-label="{plot.title}" {content}'


def to_figure(plots: Sequence[Plot], title: str) -> Figure:
    """Return plots below each other, with their titles, as one figure of Matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(fname=_STYLE):
        heights = [plot.height + 50 for plot in plots]
        figure = Figure((_WIDTH / 72, (sum(heights) + 50) / 72))
        figure.suptitle(title, x=0.02, ha="left", size=14, weight="bold")
        rows = figure.subfigures(len(plots), 1, height_ratios=heights, squeeze=False)
        for plot, part in zip(plots, rows[:, 0], strict=True):
            part.suptitle(plot.title, x=0.02, ha="left", size=12)
            plot.draw(part.add_subplot(), _WIDTH)
    return figure
