"""Draw the figures of the documentation from the runs in benchmarks/results.

    make results                     (runs this script and benchmarks/pages.py)
    python benchmarks/figures.py     (needs matplotlib: pip install 'wanda_lightning[report]')

For each name in `FIGURES`, a function returns what `docs/NAME.svg` shows, and another draws it. The file holds the
first as its description, so that a test compares it with the runs without drawing.
"""

import json
from itertools import pairwise
from typing import TYPE_CHECKING

from result import OURS, read_table
from tables import LABELS, ROOT, lookup

from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.common.checks import require_extra

if TYPE_CHECKING:
    pass

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
PRESETS = ("thorough", "best", "balanced", "fast")
COMPARED = (  # method, whose implementation, label
    ("thorough", OURS, "thorough"),
    ("best", OURS, "best"),
    ("balanced", OURS, "balanced"),
    ("fast", OURS, "fast"),
    ("alps", ALPS, "ALPS, authors' code"),
    ("sparsegpt", REFERENCE, "SparseGPT, reference code"),
    ("sparsegpt", OURS, "SparseGPT, ours"),
    ("wanda", OURS, "Wanda"),
    ("magnitude", OURS, "magnitude"),
)


# Where a name may stand beside its point: shift in points, and horizontal and vertical alignment.
SIDES = [
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
]
for shift in (9, -9, 16, -16, 26):
    SIDES += [(8, shift, "left", "center"), (-8, shift, "right", "center")]
SIDES += [(0, -18, "center", "top"), (0, 18, "center", "bottom"), (0, -30, "center", "top")]


def methods():
    """Perplexity at each sparsity and seconds of pruning, for the presets and for other methods."""
    rows = []
    for method, code, label in COMPARED:
        table = read_table("methods" if code == OURS else "reference")
        cells = lookup(run for run in table if run.code == code)
        runs = {goal: cells[method, goal] for goal in GOALS if (method, goal) in cells}
        perplexities = {goal: round(run.measured["perplexity"], 2) for goal, run in runs.items()}
        # The seconds of other implementations are of machines whose state was not recorded.
        seconds = [round(run.measured["seconds"]) for run in runs.values() if code == OURS]
        rows.append({"label": label, "perplexity": perplexities, "seconds": seconds})
    return {"dense": _dense(), "rows": rows}


def _dense():
    return round(lookup(read_table("methods"))["dense", "dense"].measured["perplexity"], 2)


def draw_methods(data):
    """Draw one line for each method, with a mark for each sparsity."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.3), layout="constrained")
    rows = data["rows"]
    heights = range(len(rows), 0, -1)
    beside = {"xycoords": ("axes fraction", "data"), "va": "center"}
    marks = {}
    for height, row in zip(heights, rows, strict=True):
        values = row["perplexity"].values()
        axes.plot([min(values), max(values)], [height, height], color=GRID, linewidth=2, zorder=1)
        for goal, value in row["perplexity"].items():
            color, marker = GOALS[goal]
            marks[goal] = axes.scatter(value, height, s=46, color=color, marker=marker, zorder=2)

        seconds = row["seconds"]
        if seconds:
            ends = sorted({min(seconds), max(seconds)})
            axes.annotate(f"{' to '.join(map(str, ends))} s", (1.02, height), **beside, color=INK)
        else:
            axes.annotate("not compared", (1.02, height), **beside, color=FAINT)

    top = len(rows) + 0.8
    axes.annotate("time to prune", (1.02, top), **beside, color=FAINT)
    dense = data["dense"]
    axes.plot([dense, dense], [0, len(rows) + 0.5], color=FAINT, linewidth=1, linestyle="--")
    axes.annotate(f"dense {dense}", (dense, top), va="center", ha="center", color=FAINT)

    axes.set_yticks(heights, [row["label"] for row in rows])
    for text in axes.get_yticklabels()[: len(PRESETS)]:
        text.set_fontweight("bold")
    axes.set(xlabel="perplexity, logarithmic: lower is better", ylim=(0.4, len(rows) + 1.1))
    _logarithmic(axes, "x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    handles = [marks[goal] for goal in GOALS]
    axes.legend(handles, GOALS, title="sparsity", loc=(0.72, 0.42), frameon=False)
    return figure


def _logarithmic(axes, *names):
    """Give axes logarithmic scales with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.grid(color=GRID, linewidth=0.6)
    axes.minorticks_off()
    axes.set_axisbelow(True)


def frontier():
    """Seconds and perplexity of all methods but magnitude, fastest first, for each goal."""
    panels = {}
    for goal in GOALS:
        points = []
        for run in read_table("methods"):
            if run.goal == goal and run.method != "magnitude" and "seconds" in run.measured:
                name = _short(run.method)
                points.append((run.measured["seconds"], run.measured["perplexity"], name))
        panels[goal] = [[round(x, 1), round(y, 2), name] for x, y, name in sorted(points)]
    return {"dense": _dense(), "panels": panels}


def _short(method):
    """Return the name of a method without Markdown."""
    return (
        LABELS[method]
        .replace("`", "")
        .replace('sequential="layer"', "layer")
        .replace("with a permutation", "permuted")
    )


def draw_frontier(data):
    """Draw one panel for each goal. A line joins the methods that no faster method equals in perplexity."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(data["panels"]), 1, figsize=(9, 12), layout="constrained", sharex=True
    )
    for panel, (goal, points) in zip(panels, data["panels"].items(), strict=True):
        best = _best(points)
        seconds, perplexities, _ = zip(*best, strict=True)
        panel.plot(seconds, perplexities, color=BLUE, linewidth=1.5, zorder=1)
        for point in points:
            color = BLUE if point in best else FAINT
            panel.scatter(point[0], point[1], s=30, color=color, zorder=2)

        dense = data["dense"]
        panel.axhline(dense, color=FAINT, linewidth=1, linestyle="--")
        corner = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        panel.annotate("dense", (1, dense), **corner)
        panel.set(title=f"{goal} zeros" if "%" in goal else goal, ylabel="perplexity")
        panel.margins(x=0.12, y=0.12)
        _logarithmic(panel, "x", "y")
    panels[-1].set_xlabel("seconds to prune")
    figure.draw_without_rendering()  # the positions of all points are known from here on
    for panel, points in zip(panels, data["panels"].values(), strict=True):
        _name_points(panel, points)
    return figure


def _best(points):
    """Return the points that no faster point equals in perplexity. The fastest point comes first."""
    return [
        point
        for index, point in enumerate(points)
        if all(other[1] > point[1] for other in points[:index])
    ]


def _name_points(panel, points):
    """Write a name beside each point, where it covers no point, no other name and not the line of the best."""
    from matplotlib.transforms import Bbox

    def in_pixels(points):
        return panel.transData.transform([point[:2] for point in points])

    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in in_pixels(points)]
    for start, end in pairwise(in_pixels(_best(points))):
        for step in range(51):
            x, y = start + (end - start) * step / 50
            taken.append(Bbox.from_bounds(x - 1, y - 1, 2, 2))

    for x, y, name in points:
        for dx, dy, horizontal, vertical in SIDES:
            style = {"ha": horizontal, "va": vertical, "fontsize": 9}
            text = panel.annotate(
                name, (x, y), xytext=(dx, dy), textcoords="offset points", **style
            )
            box = text.get_window_extent().padded(1)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            # The last side stays even if it covers something.
            if (dx, dy, horizontal, vertical) != SIDES[-1]:
                text.remove()


FIGURES = {
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
