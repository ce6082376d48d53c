"""Names beside the points of a plot, where they cover as little as possible.

A name stands beside its point or, farther away, is joined with it by a thin line, its leader. Names
are placed one after the other, and moved again while there is something to gain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from velora_torch.report.inline_svg import GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    from velora_torch.bench.plot import Point

    Boxes = np.ndarray
    """One box in each row: left, bottom, right, top, in pixels."""
    Line = tuple[tuple[float, float], tuple[float, float]]
    """From one point to another."""

ROOM = 6.0  # half the side of the square that a point keeps free, in points
FONT = 10.5
NEAR = 16.0  # a name that is farther above or below gets a leader, in points
ROUNDS = 8
# What a pixel weighs that a name has in common with the mark of a point, that a line has in common
# with anything, or that is outside of the plot, and what a piece of a leader does, in pixels that
# two names have in common:
MARK, THIN, OUTSIDE, LENGTH = 4.0, 8.0, 10.0, 2.0
_NONE = np.empty((0, 4))
_LEADER = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 5}


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a name may stand."""

    offset: tuple[float, float]
    """From its point, in points."""
    name: Boxes
    leader: Boxes
    """Side by side along it, without what touches the name or its point; none if it is near."""
    alone: int
    """What it costs before other names are placed."""

    def cost(self, names: Boxes, leaders: Boxes) -> int:
        """What it costs beside these."""
        thin = _common(self.name, leaders) + _common(self.leader, np.concatenate([names, leaders]))
        return self.alone + round(_common(self.name, names) + THIN * thin)


@dataclass(frozen=True)
class _Plot:
    """What is there before the names are."""

    inside: Boxes
    marks: Boxes
    """One for each point, with its error bar."""
    lines: Boxes
    """Side by side along the lines that are drawn."""
    pixel: float
    """Pixels in a point of 1/72 inch."""

    def place(self, offset: tuple[float, float], name: Boxes, leader: Boxes) -> _Place:
        covered = MARK * _common(name, self.marks) + THIN * _common(name, self.lines)
        crossed = THIN * _common(leader, np.concatenate([self.marks, self.lines]))
        outside = OUTSIDE * (_common(name, name) - _common(name, self.inside))
        alone = round(covered + crossed + outside + LENGTH * len(leader))
        return _Place(offset, name, leader, alone)


def place_labels(
    figure: Figure, axes: Axes, points: Sequence[Point], lines: Sequence[Line] = ()
) -> list[Bbox]:
    """Write the names of the points.

    Args:
        figure: with everything else drawn.
        axes: where the points are.
        points: each with the point that it is joined with, if any.
        lines: others that names should keep off, in units of the axes.

    Returns:
        The boxes of the names, in pixels, in the order of the points.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # fixes the layout and the limits
    axes.autoscale(enable=False)
    pixel = figure.dpi / 72
    marks = np.concatenate([_mark(axes, point, ROOM * pixel) for point in points])
    drawn = [_NONE, *(_on_screen(axes, line, pixel) for line in [*_pairs(points), *lines])]
    plot = _Plot(np.array([axes.bbox.extents]), marks, np.concatenate(drawn), pixel)
    options = [
        _places(plot, axes, point, own) for point, own in zip(points, marks[:, None], strict=True)
    ]
    by_x, by_y = (np.argsort(marks[:, axis], kind="stable").tolist() for axis in (0, 1))
    placed = _choose(options, [list(range(len(points))), by_x, by_y])
    for point, place in zip(points, placed, strict=True):
        dx, dy = place.offset
        axes.annotate(
            point.label,
            (point.memory, point.score),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="center_baseline",
            color=INK,
            fontsize=FONT,
            parse_math=False,
            arrowprops=_LEADER if abs(dy) > NEAR else None,
        )
    return [Bbox.from_extents(*place.name[0]) for place in placed]


def _choose(options: Sequence[list[_Place]], orders: Sequence[list[int]]) -> list[_Place]:
    """One place for each name: the best end of these orders of placing them, and of the reverse."""
    ends = [_settle(options, way) for order in orders for way in (order, order[::-1])]
    return min(ends, key=lambda end: end[0])[1]


def _settle(options: Sequence[list[_Place]], order: Sequence[int]) -> tuple[int, list[_Place]]:
    """Place names in this order, each where it costs least, and again until none moves.

    Returns:
        What they cost in the last round, and the places in the order of the options.
    """
    placed: dict[int, _Place] = {}
    for _ in range(ROUNDS):
        before, total = dict(placed), 0
        for i in order:
            cost, placed[i] = _best(options[i], [p for j, p in placed.items() if j != i])
            total += cost
        if placed == before:
            break
    return total, [placed[i] for i in range(len(options))]


def _best(places: Sequence[_Place], others: Sequence[_Place]) -> tuple[int, _Place]:
    """The first of the cheapest places of a name beside the others, and what it costs."""
    names = np.concatenate([_NONE, *(place.name for place in others)])
    leaders = np.concatenate([_NONE, *(place.leader for place in others)])
    best: tuple[int, _Place] | None = None
    for place in places:
        if best is None or place.alone < best[0]:
            cost = place.cost(names, leaders)
            best = (cost, place) if best is None or cost < best[0] else best
    assert best is not None
    return best


@functools.cache
def _offsets() -> list[tuple[float, float]]:
    """Where a name may be written, from its point, in points: the nearest places first."""
    sides = [(10.0, 0.0), (-10.0, 0.0), (0.0, 15.0), (0.0, -15.0)]
    diagonal = [(dx, dy) for dy in (11.0, -11.0) for dx in (9.0, -9.0)]
    across = (0, 16, -16, 40, -40)
    far = [(dx, sign * dy) for dy in range(24, 110, 9) for sign in (1, -1) for dx in across]
    return [*sides, *diagonal, *far]


def _places(plot: _Plot, axes: Axes, point: Point, own: Boxes) -> list[_Place]:
    """In the order of `_offsets`."""
    text = axes.text(point.memory, point.score, point.label, fontsize=FONT, parse_math=False)
    width, height = text.get_window_extent().size
    text.remove()
    at = axes.transData.transform((point.memory, point.score)).tolist()
    places = []
    for dx, dy in _offsets():
        x, y = at[0] + dx * plot.pixel, at[1] + dy * plot.pixel
        left = x if dx > 0 else x - width if dx < 0 else x - width / 2
        name = np.array([[left, y - height / 2, left + width, y + height / 2]])
        whole = _along((left + width / 2, y), at, plot.pixel) if abs(dy) > NEAR else _NONE
        ends = np.concatenate([name, own])
        leader = [piece for piece in whole if not _common(piece[None], ends)]
        places.append(plot.place((dx, dy), name, np.reshape(leader, (-1, 4))))
    return places


def _mark(axes: Axes, point: Point, room: float) -> Boxes:
    """What a point and its error bar cover."""
    x, low = axes.transData.transform((point.memory, point.score - point.error))
    _, high = axes.transData.transform((point.memory, point.score + point.error))
    return np.array([[x - room, low - room, x + room, high + room]])


def _pairs(points: Sequence[Point]) -> list[Line]:
    by_name = {point.variant: point for point in points}
    joined = [(by_name[point.base], point) for point in points if point.base in by_name]
    return [((base.memory, base.score), (one.memory, one.score)) for base, one in joined]


def _on_screen(axes: Axes, line: Line, pixel: float) -> Boxes:
    start, end = axes.transData.transform(line).tolist()
    return _along(start, end, pixel)


def _along(start: Sequence[float], end: Sequence[float], half: float) -> Boxes:
    """Squares side by side along a line, without its ends."""
    steps = max(1, math.ceil(math.dist(start, end) / (2 * half)))
    shares = np.arange(1, steps)[:, None] / steps
    centres = np.array(start) + (np.array(end) - start) * shares
    return np.concatenate([centres - half, centres + half], axis=1)


def _common(a: Boxes, b: Boxes) -> float:
    """Pixels that boxes have in common, summed over all pairs."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return float(np.prod(np.maximum(high - low, 0.0), axis=-1).sum())
