"""Draw the figures of the documentation from the runs in benchmarks/results.

    make results                     (runs this script and benchmarks/pages.py)
    python benchmarks/figures.py     (needs matplotlib: pip install 'wanda_lightning[report]')

For each name in `FIGURES`, a function returns what `docs/NAME.svg` shows, and another draws it: dots for the same
quantity of several methods, or curves. The file holds the first as its description, so that a test compares it with the
runs without drawing.
"""

import json
from itertools import cycle

from result import OURS, read_drawn, read_table
from tables import LABELS, REFERENCE, ROOT, in_order, lookup, number

from wanda_lightning.common.atomic_write import atomic_write
from wanda_lightning.common.checks import require_extra

INK = "#1f2328"
FAINT = "#6e7781"
GRID = "#d8dee4"
BLUE = "#0969da"
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
GOALS = {"50 %": (BLUE, "o"), "60 %": ("#bc4c00", "s"), "2:4": ("#1a7f37", "D")}
COMPARED = (  # method, whose implementation, label
    ("thorough", OURS, "thorough"),
    ("best", OURS, "best"),
    ("balanced", OURS, "balanced"),
    ("fast", OURS, "fast"),
    ("alps", "ALPS", "ALPS, authors' code"),
    ("sparsegpt", REFERENCE, "SparseGPT, reference code"),
    ("sparsegpt", OURS, "SparseGPT"),
    ("wanda", OURS, "Wanda"),
    ("magnitude", OURS, "magnitude"),
)


def methods():
    """Perplexity of methods at each sparsity with its deviation, and their seconds."""
    ours = read_drawn("methods")
    runs = {(run.code, *key): run for key, run in lookup(ours).items()}
    for run in read_table("reference"):
        if run.code != OURS:
            runs[run.code, run.method, run.goal] = run

    rows = {}
    for method, code, label in COMPARED:
        cells = [runs[code, method, goal] for goal in GOALS]
        if code == OURS:  # the machines of others are not known
            cells.sort(key=lambda run: run.measured["seconds"])
            label += f", {number(cells[0], 'seconds')} to {number(cells[-1], 'seconds')}"
        rows[label] = {}
        for run in cells:
            deviation = run.measured.get("perplexity_deviation", 0)
            rows[label][run.goal] = [round(run.measured["perplexity"], 2), round(deviation, 2)]
    return {"dense": _dense(), "rows": rows}


def _dense():
    return round(lookup(read_table("methods"))["dense", "dense"].measured["perplexity"], 2)


def draw_dots(data):
    """Draw a mark for each method and sparsity, with a bar for the deviation over draws."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.3), layout="constrained")
    rows = data["rows"]
    heights = range(len(rows))
    for goal, (color, marker) in GOALS.items():
        values, deviations = zip(*(row[goal] for row in rows.values()), strict=True)
        axes.errorbar(
            values, heights, xerr=deviations, fmt=marker, color=color, ecolor=INK, label=goal
        )
    axes.axvline(data["dense"], color=FAINT, linestyle="--", label=f"dense, {data['dense']}")
    axes.set_yticks(heights, rows)
    axes.invert_yaxis()
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_xlabel("perplexity, logarithmic: lower is better")
    _logarithmic(axes, "x")
    axes.legend(loc="upper right")
    return figure


def _logarithmic(axes, *names):
    """Give axes logarithmic scales with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def frontier():
    """Seconds and perplexity of all methods but magnitude, for each goal, worst first."""
    panels = {}
    for goal in GOALS:
        points = []
        for run in read_drawn("methods"):
            if run.goal == goal and run.method != "magnitude" and "seconds" in run.measured:
                name = LABELS[run.method].replace("`", "").replace("sequential=", "")
                place = [round(run.measured["seconds"], 1), round(run.measured["perplexity"], 2)]
                points.append([*place, name])
        points.sort(key=lambda point: -point[1])
        best = [point for point in points if not any(_beats(other, point) for other in points)]
        others = [point for point in points if point not in best]
        panels[f"{goal}, dense: {_dense()}"] = [
            ["no faster method is as good", "o-", [(-6, -11)], best],
            ["other methods", "o", [(6, 5), (6, -3)], others],
        ]
    return {"x": "seconds to prune", "y": "perplexity", "is_logarithmic": True, "panels": panels}


def _beats(other, point):
    return other != point and other[0] <= point[0] and other[1] <= point[1]


def embedding():
    """Speed and score of a sentence encoder in ONNX Runtime, by its numbers and by what was taken out."""
    lines = []
    for numbers in ("float32", "int8"):
        points = {"dense": [], "structured": [], "structured, trained": []}
        for run in in_order(read_table("embedding")):
            if run.case == {"program": "onnxruntime", "numbers": numbers}:
                place = [round(run.measured[name], 2) for name in ("sentences_32", "spearman")]
                name = run.goal.removesuffix(" of units").replace("dense", f"dense, {numbers}")
                points[run.method].append([*place, name])
        trained = points["dense"] + points["structured, trained"]
        untrained = points["dense"] + points["structured"]
        lines.append(["fewer units, trained without labels", "o-", [(6, 5)], trained])
        lines.append(["fewer units, nothing trained", "o-", [(6, 5)], untrained])
    speed = "times as fast as the dense float32 model in ONNX Runtime: 32 sentences, one thread"
    score = "score on STS-B: higher is better"
    return {"x": speed, "y": score, "is_logarithmic": False, "panels": {"": lines}}


def draw_curves(data):
    """Draw a panel for each title. A line has a label, a format, the sides of names in turns, and named points."""
    import matplotlib.pyplot as plt

    panels = data["panels"]
    size = (9, 4.3 * len(panels))
    figure, rows = plt.subplots(
        len(panels), 1, figsize=size, layout="constrained", sharex=True, squeeze=False
    )
    for axes, (title, lines) in zip(rows.flat, panels.items(), strict=True):
        colors = {}
        for label, form, sides, points in lines:
            xs, ys, names = zip(*points, strict=True)
            shown = label if label not in colors else None
            color = colors.setdefault(label, FAINT if colors else BLUE)
            axes.plot(xs, ys, form, color=color, label=shown)
            for x, y, name, side in zip(xs, ys, names, cycle(sides), strict=False):
                choices = {"ha": "left" if side[0] > 0 else "right", "fontsize": 9}
                axes.annotate(name, (x, y), side, textcoords="offset points", **choices)
        axes.set(title=title, ylabel=data["y"])
        axes.margins(x=0.12, y=0.12)
        axes.grid(color=GRID, linewidth=0.6)
        if data["is_logarithmic"]:
            _logarithmic(axes, "x", "y")
        axes.legend()
    axes.set_xlabel(data["x"])
    return figure


FIGURES = {
    "methods": (methods, draw_dots),
    "frontier": (frontier, draw_curves),
    "embedding": (embedding, draw_curves),
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
