"""Figures of a report, drawn with Matplotlib: as SVG that follows the theme of its page, as PNG, and as arrays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from io import BytesIO, StringIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from wanda_lightning.common.checks import require_report_extra
from wanda_lightning.common.words import count
from wanda_lightning.models import SkipReason
from wanda_lightning.report.records import POOLED, Layers, PrunedLayer, ReportData, TrainingPass, grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLESHEET = resources.files(__package__).joinpath("templates/style.css").read_text(encoding="utf-8")
COLORS: Mapping[str, str] = dict(re.findall(r"--([\w-]+): (#\w+)", _STYLESHEET.partition("@media")[0]))
"""The colors of the light theme by name, which all differ."""
INK, MUTED, LINE, SURFACE, ACCENT = map(COLORS.__getitem__, ("ink", "muted", "line", "surface", "accent"))
_SERIES = [color for name, color in COLORS.items() if name.startswith("series")]

_LABEL: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 11, "annotation_clip": False}
_DPI = 72  # so that a point is a pixel
_STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, and a tenth of the size
    "text.parse_math": False,  # a dollar in a name is no formula
    "font.size": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "text.color": INK,
}
_IN_TAGS: Sequence[tuple[str, Any]] = (  # what is replaced in the tags of an SVG
    (r' id="[\w.]+_\d+"', ""),  # of groups, to which nothing refers
    (r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}"),
    (r"font(-size)?: ([\d.]+px)[^;\"]*(; font-family[^;\"]*)?", r"font-size: \2"),  # the family is that of the page
    *((color, f"var(--{name})") for name, color in COLORS.items()),
)

_GROUP = re.compile(r"(^|\.)group\d+$")  # each group of a grouped convolution is a layer
_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


class Grid:
    """Values by kind of layer (rows) and block (columns), in order of first occurrence; None if unknown."""

    def __init__(self, cells: Mapping[tuple[str, str], float | None]) -> None:
        self.kinds = list(dict.fromkeys(kind for kind, _ in cells))  # rows, such as `self_attn.q_proj`
        self.blocks = list(dict.fromkeys(block for _, block in cells))  # columns
        self.values = [[cells.get((kind, block)) for block in self.blocks] for kind in self.kinds]
        self.known = [value for value in cells.values() if value is not None]
        self.shown = list(dict.fromkeys(f"{value:.1%}" for value in self.known))  # the different ones as text
        self.labels = shortest_ends([kind.replace(".*", "") for kind in self.kinds])
        lists = [block.rpartition(".")[0] for block in self.blocks]  # such as `encoder.block`
        self.stacks = {name: lists.index(name) for name in dict.fromkeys(lists)}  # with their first columns
        self.height = 60 + 24 * len(self.kinds)  # of a heat map, in pixels


def layer_grid(report: ReportData, field: str) -> Grid:
    """Return the sparsity or the error of the layers of each kind in each block."""
    cells = grouped(report.layers, lambda layer: (_kind_in_block(layer), layer.block))
    return Grid({cell: getattr(Layers(layers), field) for cell, layers in cells.items() if cell[0]})


def part_grid(report: ReportData) -> Grid:
    """Return the errors of the parts of each block before and after a recovery has trained them."""
    cells = {}
    for layer in report.layers:
        if part := layer.part:
            kind = "block" if part.name == layer.block else part.name.removeprefix(f"{layer.block}.")
            cells[f"{kind} before", layer.block] = part.before
            cells[f"{kind} after", layer.block] = part.after
    return Grid(cells)


def _kind_in_block(layer: PrunedLayer) -> str:
    """Return the name of a layer within its block; empty if it lies in no block."""
    name, block = layer.siblings or layer.name, f"{layer.block}."
    return _GROUP.sub("", name.removeprefix(block)) if layer.block and name.startswith(block) else ""


def _kind_in_model(layer: PrunedLayer) -> str:
    kind = _kind_in_block(layer) or _NUMBER.sub(r"\1*", _GROUP.sub("", layer.name))
    return kind.replace(".*", "") or kind


def shortest_ends(names: Sequence[str]) -> list[str]:
    """Return the shortest end of each name, such as `q_proj`, that is not the end of another one."""
    ends = {name: [name.split(".", cuts)[-1] for cuts in range(name.count("."), -1, -1)] for name in names}
    uses = Counter(end for each in ends.values() for end in each)
    return [next((end for end in ends[name] if uses[end] == 1), name) for name in names]


def weights_by_kind(report: ReportData, most: int = 14) -> list[tuple[str, int, int, int]]:
    """Return (kind of matrix, zeros, other pruned weights, weights left dense), largest first, `most` at most."""
    pruned = grouped(report.layers, _kind_in_model)
    found = []
    for name, layers in zip(shortest_ends(list(pruned)), pruned.values(), strict=True):
        pruned_away = sum(layer.zeros for layer in layers)
        found.append((name, pruned_away, Layers(layers).size - pruned_away, 0))
    for reason, matrices in grouped(report.skipped, lambda matrix: matrix.reason).items():
        if reason is not SkipReason.TIED:  # its weights are those of another matrix
            found.append((reason.value.replace("_", " "), 0, 0, sum(matrix.size for matrix in matrices)))
    if (rest := report.parameters - sum(sum(numbers) for _, *numbers in found)) > 0:
        found.append(("norms, biases", 0, 0, rest))
    found.sort(key=lambda each: -sum(each[1:]))
    if len(found) > most:
        _, zeros, kept, dense = zip(*found[most - 1 :], strict=True)
        found[most - 1 :] = [(f"{len(zeros)} others", sum(zeros), sum(kept), sum(dense))]
    return found


def expert_tokens(report: ReportData) -> dict[str, dict[str, float]]:
    """Return how many calibration tokens the experts of each block received, as a table: numbers by heading."""
    experts = [layer for layer in report.layers if layer.siblings]
    found: dict[str, dict[str, float]] = {}
    for block, layers in grouped(experts, lambda layer: layer.block or layer.siblings.partition(".*")[0]).items():
        tokens = [layer.tokens for layer in layers]
        found[block] = {"Matrices": len(layers), "Fewest tokens": min(tokens), "Median": median(tokens)}
        found[block] |= {"Most": max(tokens), "Pooled": sum(POOLED in layer.note for layer in layers)}
    return found


@dataclass(frozen=True)
class Plot:
    """One figure, of a height in pixels; `draw` draws it on axes of a width in pixels."""

    name: str
    title: str
    height: int
    draw: Callable[[Axes, int], None]


def plots_of(report: ReportData) -> list[Plot]:
    """Return the figures for which the report has numbers; refuse if the extra `report` is not installed."""
    require_report_extra()
    sparsity, errors, parts = layer_grid(report, "sparsity"), layer_grid(report, "error"), part_grid(report)
    bars, experts = weights_by_kind(report), expert_tokens(report)
    passes = report.training.passes if report.training else ()
    plots = []
    if len(sparsity.shown) > 1:  # colors span at least 10 %, so that nearly uniform sparsities look nearly uniform
        plots.append(Plot("sparsity", "Zeros by layer", sparsity.height, partial(_draw_heat_map, sparsity, 0.1)))
    if len(errors.blocks) > 1 and errors.known:
        plots.append(_errors("error", "Relative error of the layers' outputs", errors))
    if len(parts.blocks) > 1:
        plots.append(_errors("parts", "Relative error of attention and MLP, before and after their training", parts))
    plots.append(Plot("weights", "Where the zeros are", 50 + 22 * len(bars), partial(_draw_weights, bars)))
    if len(experts) > 1:
        plots.append(Plot("experts", "Calibration tokens per expert", 260, partial(_draw_experts, [*experts.values()])))
    if len(passes) > 1:
        plots.append(Plot("training", "Loss of the recovery", 240, partial(_draw_training, passes)))
    return plots


def _errors(name: str, title: str, grid: Grid) -> Plot:
    if len(grid.kinds) > len(_SERIES):  # more lines than colors
        return Plot(name, title, grid.height, partial(_draw_heat_map, grid, 0.0))
    return Plot(name, title, 300, partial(_draw_errors, grid))


def color_range(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return the range of values that the colors span: that of the data, widened to `least` inside [0, 1]."""
    low, high = min(values), max(values)
    if high - low >= least:
        return low, high
    low = min(max(0.0, (low + high - least) / 2), 1 - least)
    return low, low + least


def _draw_heat_map(grid: Grid, least_range: float, axes: Axes, width: int) -> None:
    """Draw a cell for each layer: the larger the value, the stronger its color."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    low, high = color_range(grid.known, least_range)
    cells = [(row, column, value) for row, values in enumerate(grid.values) for column, value in enumerate(values)]
    x_gap, y_gap = len(grid.blocks) / width, 0.05  # about a pixel
    corners, colors = [], []
    for row, column, value in cells:
        if value is not None:
            top, bottom, left, right = row + y_gap, row + 1 - y_gap, column + x_gap, column + 1 - x_gap
            corners.append([(left, top), (right, top), (right, bottom), (left, bottom)])
            strength = 0.12 + 0.88 * (value - low) / (high - low) if high > low else 0.5
            colors.append((*to_rgb(ACCENT), strength))
            if width >= 26 * len(grid.blocks):
                ink = SURFACE if strength > 0.72 else INK
                axes.text(column + 0.5, row + 0.52, f"{100 * value:.0f}", color=ink, ha="center", va="center", size=10)
    axes.add_collection(PolyCollection(corners, facecolors=colors, linewidths=0))
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


def _draw_errors(grid: Grid, axes: Axes, _: int) -> None:
    """Draw a line over the blocks for each kind, in percent; "before" is dashed and has the color of "after"."""
    names = [label.removesuffix(" before").removesuffix(" after") for label in grid.labels]
    colors = dict(zip(dict.fromkeys(names), _SERIES, strict=False))
    for label, name, values in zip(grid.labels, names, grid.values, strict=True):
        style = "--" if label.endswith(" before") else "-"
        percent = [None if value is None else 100 * value for value in values]
        _draw_line(axes, label, percent, color=colors[name], linestyle=style, linewidth=1.6)
    axes.set(ylim=(0, None), xmargin=0.01)
    _number_blocks(axes, grid, 0)
    axes.yaxis.set_major_formatter("{x:g}%")
    _label_lines(axes)


def _draw_weights(bars: Sequence[tuple[str, int, int, int]], axes: Axes, _: int) -> None:
    """Draw a bar for each kind of matrix: zeros, other weights of pruned layers, and weights left dense."""
    for row, (_name, zeros, kept, dense) in enumerate(bars):
        axes.barh(row, zeros, 0.68, color=ACCENT, linewidth=0)
        axes.barh(row, kept, 0.68, left=zeros, color=ACCENT, alpha=0.35, linewidth=0)
        axes.barh(row, dense, 0.68, left=zeros + kept, color=MUTED, alpha=0.3, linewidth=0)
        size = zeros + kept + dense
        short = count(size, (" B", " M", " K"))
        text = f"{short} dense" if dense == size else f"{zeros / size:.1%} of {short}"
        axes.annotate(text, (size, row), (6, 0), color=MUTED, **_LABEL)
    axes.set(ylim=(len(bars) - 0.4, -0.6), xlim=(0, max(sum(numbers) for _, *numbers in bars)), xticks=[])
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_experts(experts: Sequence[Mapping[str, float]], axes: Axes, _: int) -> None:
    """Draw the median of the experts' tokens in each block, and the range from the fewest to the most."""
    from matplotlib.ticker import MaxNLocator

    fewest, middle, most = ([each[heading] for each in experts] for heading in ("Fewest tokens", "Median", "Most"))
    axes.fill_between(range(len(experts)), fewest, most, color=ACCENT, alpha=0.2, linewidth=0)
    _draw_line(axes, "most", most, color=MUTED, linewidth=0)
    _draw_line(axes, "median", middle, color=ACCENT, linewidth=1.8)
    _draw_line(axes, "fewest", fewest, color=MUTED, linewidth=0)
    if max(most) > 10 * max(1, min(fewest)):
        axes.set_yscale("symlog", linthresh=1)
    axes.set(ylim=(0, None), xmargin=0.01, xlabel="block with experts")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _label_lines(axes)


def _draw_training(passes: Sequence[TrainingPass], axes: Axes, _: int) -> None:
    """Draw the losses of each pass of a recovery of the whole model."""
    from matplotlib.ticker import MaxNLocator

    style = {"linewidth": 1.8, "marker": "o", "markersize": 4}
    _draw_line(axes, "trained on", [each.loss for each in passes], color=MUTED, **style)
    _draw_line(axes, "held out", [each.held_out for each in passes], color=ACCENT, **style)
    axes.set(xmargin=0.02, ymargin=0.12, xlabel="pass over the samples")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_lines(axes)


def _draw_line(axes: Axes, label: str, values: Iterable[float | None], **style: Any) -> None:
    if known := [(column, value) for column, value in enumerate(values) if value is not None]:
        axes.plot(*zip(*known, strict=True), label=label, **style)


def _label_lines(axes: Axes) -> None:
    """Write the labels of lines next to their right ends, moved apart where they would overlap; add a light grid."""
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    axes.figure.figure.draw_without_rendering()  # gives the axes their final size
    box = axes.get_window_extent()
    # Matplotlib itself labels the lines between lists of blocks: _child1, _child2, ...
    lines: list[Any] = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_child")]
    heights = [float(axes.transData.transform((1, line.get_ydata()[-1]))[1]) for line in lines]
    for line, y in zip(lines, spread_out(heights, 14, box.y0, box.y1), strict=True):  # 14 pixels: a line of text
        place, color = (1, (y - box.y0) / box.height), line.get_color()
        axes.annotate(line.get_label(), place, (6, 0), xycoords="axes fraction", color=color, **_LABEL)


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move numbers apart until neighbors differ by at least `gap`, in the same order and as little as needed."""
    moved, lowest, highest = list(places), low, high - gap * (len(places) - 1)
    for rank, index in enumerate(sorted(range(len(places)), key=places.__getitem__)):
        lowest = max(lowest, places[index] - gap * rank)
        moved[index] = min(lowest, highest) + gap * rank
    return moved


def to_svg(plot: Plot, width: int) -> str:
    """Return a figure as an SVG element whose colors are variables of the page, and whose ids no other figure has."""
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": f"{plot.name}-{width}"}), StringIO() as file:
        figure = _figure(width, plot.height)
        plot.draw(figure.add_subplot(), width)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        _, _, content = file.getvalue().partition("</defs>")  # without the metadata and the style before it
    content = re.sub(r"\s*\n\s*", " ", content)
    for pattern, replacement in _IN_TAGS:
        content = re.sub(pattern + "(?=[^<>]*>)", replacement, content)
    return f'<svg viewBox="0 0 {width} {plot.height}" role="img" aria-label="{plot.title}">{content}'


def to_png(plots: Sequence[Plot], file: Path | BytesIO, title: str = "", width: int = 900, **options: Any) -> None:
    """Write plots below each other into one PNG."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        heights = [plot.height + 50 for plot in plots]
        figure = _figure(width, sum(heights) + 50)
        if title:
            figure.suptitle(title, x=0.02, ha="left", size=14, weight="bold")
        rows = figure.subfigures(len(plots), 1, height_ratios=heights, squeeze=False)
        for plot, part in zip(plots, rows[:, 0], strict=True):
            part.suptitle(plot.title, x=0.02, ha="left", size=12)
            plot.draw(part.add_subplot(), width)
        figure.savefig(file, **{"format": "png", "dpi": 2 * _DPI, **options})


def to_array(plot: Plot, width: int = 900) -> Any:
    """Return a figure with its title as an array, (height, width, 3), of bytes."""
    import numpy as np

    file = BytesIO()
    to_png([plot], file, width=width, format="rgba", dpi=_DPI)
    return np.frombuffer(file.getvalue(), np.uint8).reshape(-1, width, 4)[..., :3].copy()


def _figure(width: int, height: int) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained", facecolor=SURFACE)
