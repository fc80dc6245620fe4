"""Labels next to lines and points, placed so that they do not cover each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanda_lightning.report.theme import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 14  # points of a line of text
_LETTER = 6.8  # points of an average letter


@dataclass(frozen=True)
class Point:
    """A labeled point."""

    label: str
    x: float
    y: float
    color: str


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (height, label, color) of lines next to their right ends, moved apart where they would overlap."""
    _lay_out(axes)
    box = axes.get_window_extent()
    heights = [float(axes.transData.transform((1, y))[1]) for y, _, _ in ends]
    spread = spread_out(heights, _HEIGHT * _pixels(axes), box.y0, box.y1)
    for y, (_, label, color) in zip(spread, ends, strict=True):
        place = (1, (y - box.y0) / box.height)
        write(axes, label, place, (6, 0), xycoords="axes fraction", color=color)


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move numbers apart until neighbors differ by at least `gap`, in the same order and as little as needed.

    >>> spread_out([1.0, 1.1, 5.0], 1.0, 0.0, 10.0)
    [1.0, 2.0, 5.0]
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    moved, lowest = list(places), low
    for index in order:
        moved[index] = lowest = max(moved[index], lowest)
        lowest += gap
    highest = high
    for index in reversed(order):
        moved[index] = highest = min(moved[index], highest)
        highest -= gap
    return moved


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write each label where it covers neither a point nor another label, if there is such a place near its point."""
    _lay_out(axes)
    pixels, inside = _pixels(axes), axes.get_window_extent()
    points = sorted(points, key=lambda point: -point.y)
    places = [axes.transData.transform((point.x, point.y)) / pixels for point in points]
    taken = [_Box(float(x) - 5, float(y) - 5, float(x) + 5, float(y) + 5) for x, y in places]
    for point, (x, y) in zip(points, places, strict=True):
        candidates = list(_around(float(x), float(y), _LETTER * len(point.label)))
        free = (
            (offset, box)
            for offset, box in candidates
            if inside.x0 <= pixels * box.left
            and pixels * box.right <= inside.x1
            and not any(box.overlaps(other) for other in taken)
        )
        offset, box = next(free, candidates[0])
        taken.append(box)
        write(axes, point.label, (point.x, point.y), offset, ha="left" if offset[0] > 0 else "right", color=INK)


@dataclass(frozen=True)
class _Box:
    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: _Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top


def _around(x: float, y: float, width: float) -> Iterator[tuple[tuple[float, float], _Box]]:
    """Yield places of a label, as offsets from its point and as boxes, nearest first."""
    for up in (lines * _HEIGHT for lines in (0, 1, -1, 2, -2, 3, -3, 4, -4)):
        for offset, left in ((8, x + 8), (-8, x - 8 - width)):
            yield (offset, up), _Box(left, y + up - _HEIGHT / 2, left + width, y + up + _HEIGHT / 2)


def write(axes: Axes, label: str, place: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Write a label at an offset, in points, from a place."""
    axes.annotate(
        label,
        place,
        xytext=offset,
        textcoords="offset points",
        va="center",
        size=11,
        annotation_clip=False,
        **style,
    )


def _lay_out(axes: Axes) -> None:
    """Give the axes their final size."""
    axes.figure.figure.draw_without_rendering()


def _pixels(axes: Axes) -> float:
    """Return the number of pixels in a point."""
    return float(axes.figure.figure.dpi) / 72
