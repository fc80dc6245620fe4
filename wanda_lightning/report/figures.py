"""Turn plots into SVG that follows the theme of the page around it, and into PNG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from os import PathLike
from typing import TYPE_CHECKING, Any

from wanda_lightning.report.plots import Plot
from wanda_lightning.report.theme import COLORS, INK, MUTED, SURFACE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 72  # so that a point is a pixel
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLORS.items()}


@contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib as mpl

    settings = {
        "svg.fonttype": "none",  # text stays text: selectable, and a tenth of the size
        "svg.hashsalt": salt,
        "text.parse_math": False,  # a dollar in a name is no formula
        "font.size": 12,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": INK,
        "text.color": INK,
        "axes.titlepad": 8,
        "axes.linewidth": 0.8,
    }
    with mpl.rc_context(settings):
        yield


def to_svg(plot: Plot, width: int) -> str:
    """Return a figure as an SVG element whose colors are variables of the page, and whose ids are unique."""
    prefix = f"{plot.name}-{width}-"
    with _style(prefix), StringIO() as file:
        figure = _figure(width, plot.height)
        plot.draw(figure.add_subplot(), width)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", text)  # HTML needs none
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{plot.title}"', text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)  # Matplotlib before 3.11
    text = re.sub(r"font-family: [^;\"]+; ?", "", text)  # that of the page
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _rounded, tag[0]), text)
    text = re.sub(r"\s*\n\s*", " ", text)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}", text)
    return re.sub(r"<[^>]+>", lambda tag: re.sub("|".join(_VARIABLES), _variable, tag[0]), text)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}"


def _variable(color: re.Match[str]) -> str:
    return _VARIABLES[color[0]]


def _figure(width: int, height: int) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained", facecolor=SURFACE)


def to_png(plots: Sequence[Plot], path: str | PathLike[str] | BytesIO, title: str = "", width: int = 900) -> None:
    """Write plots below each other into one PNG."""
    with _style("png"):
        _stacked(plots, title, width).savefig(path, format="png", dpi=2 * _DPI)


def to_array(plot: Plot, width: int = 900) -> Any:
    """Return a figure with its title as an array, (height, width, 3), of bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with _style("png"):
        canvas = FigureCanvasAgg(_stacked([plot], "", width))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _stacked(plots: Sequence[Plot], title: str, width: int) -> Figure:
    heights = [plot.height + 50 for plot in plots]
    figure = _figure(width, sum(heights) + 50)
    if title:
        figure.suptitle(title, x=0.02, ha="left", size=14, weight="bold")
    rows = figure.subfigures(len(plots), 1, height_ratios=heights, squeeze=False)
    for plot, part in zip(plots, rows[:, 0], strict=True):
        part.suptitle(plot.title, x=0.02, ha="left", size=12)
        plot.draw(part.add_subplot(), width)
    return figure
