"""Draw the figures of the documentation from the runs in benchmarks/results.

    make results                     (runs this script and benchmarks/pages.py)
    python benchmarks/figures.py     (needs matplotlib: pip install 'wanda_lightning[report]')

For each name in `FIGURES`, a function returns what `docs/NAME.svg` shows, and another draws it. The file holds the
first as its description, so that a test compares it with the runs without drawing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from result import OURS, read_table
from tables import LABELS, ROOT, lookup

from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.common.checks import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2328"
FAINT = "#6e7781"
GRID = "#d8dee4"
BLUE = "#0969da"
GREEN = "#1a7f37"
ORANGE = "#bc4c00"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "white",  # a white card, also on a dark page
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
    "svg.hashsalt": "wanda_lightning",  # the same picture has the same bytes
}
GOALS = {"50 %": (BLUE, "o"), "60 %": (ORANGE, "s"), "2:4": (GREEN, "D")}
REFERENCE = "locuslab/wanda"
ALPS = "ALPS"
Point = Sequence[Any]  # seconds, perplexity, name
PRESETS = ("thorough", "best", "balanced", "fast")
COMPARED = (  # method, whose implementation, label
    *((name, OURS, name) for name in PRESETS),
    ("alps", ALPS, "ALPS, authors' code"),
    ("sparsegpt", REFERENCE, "SparseGPT, reference code"),
    ("sparsegpt", OURS, "SparseGPT, ours"),
    ("wanda", OURS, "Wanda"),
    ("magnitude", OURS, "magnitude"),
)


def methods() -> dict[str, Any]:
    """Perplexity at each sparsity and seconds of pruning, for the presets and for other methods."""
    rows = []
    for method, code, label in COMPARED:
        found = lookup(
            run
            for run in read_table("methods" if code == OURS else "reference")
            if run.code == code
        )
        runs = {goal: found[method, goal] for goal in GOALS if (method, goal) in found}
        points = {goal: round(run.measured["perplexity"], 2) for goal, run in runs.items()}
        # The seconds of other implementations are of machines whose state was not recorded.
        times = [run.measured["seconds"] for run in runs.values() if code == OURS]
        rows.append(
            {"label": label, "perplexity": points, "seconds": [round(each) for each in times]}
        )
    return {"dense": _dense(), "rows": rows}


def _dense() -> float:
    return round(lookup(read_table("methods"))["dense", "dense"].measured["perplexity"], 2)


def draw_methods(data: Mapping[str, Any]) -> "Figure":
    """Draw one line for each method, with a mark for each sparsity."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.3), layout="constrained")
    rows = data["rows"]
    for height, row in zip(range(len(rows), 0, -1), rows, strict=True):
        values = row["perplexity"].values()
        axes.plot([min(values), max(values)], [height, height], color=GRID, linewidth=2, zorder=1)
        for goal, value in row["perplexity"].items():
            color, marker = GOALS[goal]
            axes.scatter(value, height, s=46, color=color, marker=marker, zorder=2, label=goal)
        times = {min(row["seconds"]), max(row["seconds"])} if row["seconds"] else ()
        shown = " to ".join(map(str, sorted(times))) + " s" if times else "not compared"
        beside = {"xycoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate(shown, (1.02, height), **beside, color=INK if times else FAINT)
    axes.annotate("time to prune", (1.02, len(rows) + 0.8), **beside, color=FAINT)
    axes.plot([data["dense"]] * 2, [0, len(rows) + 0.5], color=FAINT, linewidth=1, linestyle="--")
    axes.annotate(
        f"dense {data['dense']}",
        (data["dense"], len(rows) + 0.8),
        va="center",
        ha="center",
        color=FAINT,
    )
    axes.set_yticks(range(len(rows), 0, -1), [row["label"] for row in rows])
    for text in axes.get_yticklabels()[: len(PRESETS)]:
        text.set_fontweight("bold")
    axes.set(xlabel="perplexity, logarithmic: lower is better", ylim=(0.4, len(rows) + 1.1))
    _logarithmic(axes, "x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(
        [handles[goal] for goal in GOALS], GOALS, title="sparsity", loc=(0.72, 0.42), frameon=False
    )
    return figure


def _logarithmic(axes: "Axes", *names: str) -> None:
    """Give axes logarithmic scales with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.grid(color=GRID, linewidth=0.6)
    axes.minorticks_off()
    axes.set_axisbelow(True)


def frontier() -> dict[str, Any]:
    """Seconds and perplexity of all methods but magnitude, fastest first, for each goal."""
    panels: dict[str, list[list[Any]]] = {}
    for goal in ("50 %", "60 %", "2:4"):
        own = [
            run
            for run in read_table("methods")
            if run.goal == goal and run.method != "magnitude" and "seconds" in run.measured
        ]
        points = [
            (run.measured["seconds"], run.measured["perplexity"], _short(run.method)) for run in own
        ]
        panels[goal] = [[round(x, 1), round(y, 2), name] for x, y, name in sorted(points)]
    return {"dense": _dense(), "panels": panels}


def _short(method: str) -> str:
    """Return the name of a method without Markdown."""
    return (
        LABELS[method]
        .replace("`", "")
        .replace('sequential="layer"', "layer")
        .replace("with a permutation", "permuted")
    )


def draw_frontier(data: Mapping[str, Any]) -> "Figure":
    """Draw one panel for each goal. A line joins the methods that no faster method equals in perplexity."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(data["panels"]), 1, figsize=(9, 12), layout="constrained", sharex=True
    )
    for panel, (goal, points) in zip(panels, data["panels"].items(), strict=True):
        best = _best(points)
        panel.plot(
            *zip(*((x, y) for x, y, _ in best), strict=True), color=BLUE, linewidth=1.5, zorder=1
        )
        for x, y, name in points:
            panel.scatter(x, y, s=30, color=BLUE if [x, y, name] in best else FAINT, zorder=2)
        panel.axhline(data["dense"], color=FAINT, linewidth=1, linestyle="--")
        panel.annotate(
            "dense", (1, data["dense"]), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
        panel.set(title=f"{goal} zeros" if "%" in goal else goal, ylabel="perplexity")
        panel.margins(x=0.12, y=0.12)
        _logarithmic(panel, "x", "y")
    panels[-1].set_xlabel("seconds to prune")
    figure.draw_without_rendering()  # the positions of all points are known from here on
    for panel, points in zip(panels, data["panels"].values(), strict=True):
        _name_points(panel, points)
    return figure


def _best(points: Sequence[Point]) -> list[Point]:
    """Return the points that no faster point equals in perplexity. The fastest point comes first."""
    return [
        point
        for index, point in enumerate(points)
        if all(other[1] > point[1] for other in points[:index])
    ]


def _name_points(panel: "Axes", points: Sequence[Point]) -> None:
    """Write a name beside each point, where it covers no point, no other name and not the line of the best."""
    from matplotlib.transforms import Bbox

    pixels, line = (
        panel.transData.transform([point[:2] for point in chosen])
        for chosen in (points, _best(points))
    )
    between = [a + (b - a) * step / 50 for a, b in pairwise(line) for step in range(51)]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in pixels]
    taken += [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in between]
    sides = [
        (9, 0, "left", "center"),
        (-9, 0, "right", "center"),
        (0, 7, "center", "bottom"),
        (0, -7, "center", "top"),
    ]
    sides += [
        (x, y, side, "center")
        for y in (9, -9, 16, -16, 26)
        for x, side in ((8, "left"), (-8, "right"))
    ]
    sides += [
        (0, y, "center", vertical) for y, vertical in ((-18, "top"), (18, "bottom"), (-30, "top"))
    ]
    for x, y, name in points:
        for dx, dy, horizontal, vertical in sides:
            style = {"ha": horizontal, "va": vertical, "fontsize": 9}
            text = panel.annotate(
                name, (x, y), xytext=(dx, dy), textcoords="offset points", **style
            )
            box = text.get_window_extent().padded(1)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            if (dx, dy, horizontal, vertical) != sides[-1]:
                text.remove()


FIGURES: Mapping[
    str, tuple[Callable[[], dict[str, Any]], Callable[[Mapping[str, Any]], "Figure"]]
] = {
    "methods": (methods, draw_methods),
    "frontier": (frontier, draw_frontier),
}


def main() -> None:
    """Draw all figures."""
    require_extra("report", "matplotlib", purpose="Figures")
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(STYLE)
    for name, (collect, draw) in FIGURES.items():
        data = collect()
        with atomic_write(ROOT / "docs" / f"{name}.svg") as new:
            description = {"Date": None, "Description": json.dumps(data)}
            draw(data).savefig(new, format="svg", metadata=description)


if __name__ == "__main__":
    main()
