"""Draw perplexity against seconds of pruning, for each sparsity in a results file of benchmarks/quality.py.

    python benchmarks/frontier.py benchmarks/results/smollm2.json docs/frontier.svg

A line joins the methods on the frontier: no other method has a lower perplexity in less time.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from wanda_lightning.files import whole_file

Point = tuple[float, float, str]  # seconds, perplexity, method


def points(cells: dict[str, dict[str, dict]], goal: str) -> list[Point]:
    """Return the measured methods at a goal, fastest first."""
    measured = ((name, of[goal]) for name, of in cells.items() if "seconds" in of.get(goal, {}))
    return sorted((cell["seconds"], cell["perplexity"], name) for name, cell in measured)


def frontier(measured: list[Point]) -> list[Point]:
    """Return the points that no faster point equals in perplexity."""
    return [point for index, point in enumerate(measured) if all(other[1] > point[1] for other in measured[:index])]


def draw(cells: dict[str, dict[str, dict]], goals: list[str]) -> plt.Figure:
    """Return one panel for each goal, with logarithmic axes."""
    figure, panels = plt.subplots(1, len(goals), figsize=(5 * len(goals), 4.6), layout="constrained", squeeze=False)
    for goal, panel in zip(goals, panels[0], strict=True):
        measured = points(cells, goal)
        best = frontier(measured)
        panel.plot(*zip(*((x, y) for x, y, _ in best), strict=True), color="tab:blue", linewidth=1, zorder=1)
        for index, (x, y, name) in enumerate(measured):
            on_it = (x, y, name) in best
            above = index % 2 == 0
            panel.scatter(x, y, s=22, color="tab:blue" if on_it else "tab:gray", zorder=2)
            panel.annotate(
                name,
                (x, y),
                xytext=(3, 4 if above else -4),
                va="bottom" if above else "top",
                textcoords="offset points",
                fontsize=8,
                color="black" if on_it else "gray",
            )
        if dense := cells.get("dense", {}).get("", {}).get("perplexity"):
            panel.axhline(dense, color="tab:green", linewidth=1, linestyle="--")
            panel.annotate("dense", (1, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        panel.set(xscale="log", yscale="log", xlabel="seconds to prune", title=f"{goal} %" if ":" not in goal else goal)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.2)
    panels[0][0].set_ylabel("perplexity")
    return figure


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description="Draw perplexity against seconds.")
    parser.add_argument("results", help="FILE.json, written by benchmarks/quality.py --save")
    parser.add_argument("picture", help="the file to write: .svg, .png or .pdf")
    parser.add_argument("--goals", nargs="+", default=["50", "60", "2:4"])
    parser.add_argument("--without", nargs="*", default=["magnitude"], help="methods to leave out")
    options = parser.parse_args()
    found = json.loads(Path(options.results).read_text(encoding="utf-8"))["cells"]
    cells = {name: of for name, of in found.items() if name not in options.without}
    for goal in options.goals:
        if not points(cells, goal):
            parser.error(f"--goals must be measured in {options.results}, but {goal} is not.")
    mpl.rcParams["svg.hashsalt"] = "frontier"  # the same picture has the same bytes
    with whole_file(options.picture) as new:
        draw(cells, options.goals).savefig(new, format=Path(options.picture).suffix[1:], metadata={"Date": None})


if __name__ == "__main__":
    main()
