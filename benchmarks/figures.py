"""Draw the figures of the documentation from the runs in benchmarks/results.

    make results                     (runs this script and benchmarks/pages.py)
    python benchmarks/figures.py     (needs matplotlib: pip install 'wanda_lightning[report]')

For each name in `FIGURES`, a function returns what `docs/NAME.svg` shows, and another draws it. The file holds the
first as its description, so that a test compares it with the runs without drawing.
"""

import json

from result import OURS, read_drawn, read_table
from tables import LABELS, REFERENCE, ROOT, in_order, lookup

from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.common.checks import require_extra

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


# Where a name may stand beside its point: shift in points, and horizontal alignment.
SIDES = [(9, 0, "left"), (-9, 0, "right"), (0, 12, "center"), (0, -12, "center")]
for shift in (9, -9, 16, -16, 26):
    SIDES += [(8, shift, "left"), (-8, shift, "right")]
SIDES += [(0, shift, "center") for shift in (-23, 23, -35)]


def methods():
    """Perplexity at each sparsity and seconds of pruning, for the presets and for other methods."""
    rows = []
    for method, code, label in COMPARED:
        table = read_drawn("methods") if code == OURS else read_table("reference")
        cells = lookup(run for run in table if run.code == code)
        runs = {goal: cells[method, goal] for goal in GOALS if (method, goal) in cells}
        perplexities = {goal: round(run.measured["perplexity"], 2) for goal, run in runs.items()}
        # The seconds of other implementations are of machines whose state was not recorded.
        seconds = sorted(round(run.measured["seconds"]) for run in runs.values() if code == OURS)
        deviations = {
            goal: round(run.measured["perplexity_deviation"], 2)
            for goal, run in runs.items()
            if "perplexity_deviation" in run.measured
        }
        rows.append(
            {
                "label": label,
                "perplexity": perplexities,
                "deviation": deviations,
                "seconds": seconds,
            }
        )
    return {"dense": _dense(), "rows": rows}


def _dense():
    return round(lookup(read_table("methods"))["dense", "dense"].measured["perplexity"], 2)


def draw_methods(data):
    """Draw one line for each method, with a mark for each sparsity, and a bar for the deviation over draws."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.3), layout="constrained")
    rows = data["rows"]
    marks = {}
    times = []
    for height, row in enumerate(rows):
        values = sorted(row["perplexity"].values())
        axes.plot([values[0], values[-1]], [height, height], color=GRID, linewidth=2, zorder=1)
        for goal, value in row["perplexity"].items():
            color, marker = GOALS[goal]
            marks[goal] = axes.scatter(value, height, s=46, color=color, marker=marker, zorder=2)
            deviation = row["deviation"].get(goal)
            if deviation:
                axes.errorbar(value, height, xerr=deviation, color=INK, capsize=3, linewidth=1)
        ends = dict.fromkeys(row["seconds"][:1] + row["seconds"][-1:])
        times.append(f"{' to '.join(map(str, ends))} s" if ends else "not compared")

    top = -0.8
    dense = data["dense"]
    bottom = len(rows)
    axes.plot([dense, dense], [-0.5, bottom], color=FAINT, linewidth=1, linestyle="--")
    axes.annotate(f"dense {dense}", (dense, top), va="center", ha="center", color=FAINT)

    axes.set_yticks(range(bottom), [row["label"] for row in rows])
    right = axes.secondary_yaxis("right")
    right.set_yticks([top, *range(bottom)], ["time to prune", *times])
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    for text in axes.get_yticklabels()[: len(PRESETS)]:
        text.set_fontweight("bold")
    axes.set(xlabel="perplexity, logarithmic: lower is better", ylim=(bottom - 0.4, -1.1))
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
        for run in read_drawn("methods"):
            if run.goal == goal and run.method != "magnitude" and "seconds" in run.measured:
                name = _short(run.method)
                points.append((run.measured["seconds"], run.measured["perplexity"], name))
        panels[goal] = [[round(x, 1), round(y, 2), name] for x, y, name in sorted(points)]
    return {"dense": _dense(), "panels": panels}


def _short(method):
    """Return the name of a method without Markdown."""
    return LABELS[method].replace("`", "").replace('sequential="layer"', "layer")


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
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    def in_pixels(points):
        return panel.transData.transform([point[:2] for point in points])

    line = Path(in_pixels(_best(points))).interpolated(50).vertices
    taken = []
    for places, size in ((in_pixels(points), 5), (line, 1)):
        taken += [Bbox([place, place]).padded(size) for place in places]

    for x, y, name in points:
        text = panel.annotate(
            name, (x, y), (0, 0), textcoords="offset points", va="center", fontsize=9
        )
        # The last side stays even if it covers something.
        for dx, dy, side in SIDES:
            text.set(position=(dx, dy), ha=side)
            box = text.get_window_extent().padded(1)
            if not box.count_overlaps(taken):
                break
        taken.append(box)


def embedding():
    """Speed and score of a sentence encoder in ONNX Runtime, by its numbers and by what was taken out."""
    points = {}
    for run in in_order(read_table("embedding")):
        numbers = run.case["numbers"]
        if run.case["program"] == "onnxruntime":
            place = [round(run.measured[name], 2) for name in ("sentences_32", "spearman")]
            name = (
                f"dense, {numbers}" if run.method == "dense" else run.goal.removesuffix(" of units")
            )
            by_method = points.setdefault(numbers, {})
            by_method.setdefault(run.method, []).append([*place, name])
    return points


def draw_embedding(data):
    """Draw lines from the dense model to fewer units, in float32 and in int8."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.3), layout="constrained")
    for by_method in data.values():
        dense, *others = by_method.values()
        for color, points in zip((FAINT, BLUE), others, strict=False):
            speeds, scores, names = zip(*dense, *points, strict=True)
            axes.plot(speeds, scores, "o-", color=color)
            for place in zip(names, zip(speeds, scores, strict=True), strict=True):
                axes.annotate(*place, (6, 5), textcoords="offset points", fontsize=9)
    axes.set(
        xlabel="times as fast as the dense float32 model in ONNX Runtime: 32 sentences, one thread",
        ylabel="score on STS-B: higher is better",
    )
    title = "hidden units taken out"
    axes.legend(["nothing trained", "then trained, without labels"], title=title, frameon=False)
    axes.grid(color=GRID, linewidth=0.6)
    return figure


FIGURES = {
    "methods": (methods, draw_methods),
    "frontier": (frontier, draw_frontier),
    "embedding": (embedding, draw_embedding),
}


def main():
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
