"""Accuracy against memory: a point for each variant, joined with the one it is compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from velora_torch.bench.table import Line, Summary
from velora_torch.report.figures import single, write_figure
from velora_torch.report.inline_svg import BLUE, GREY, INK, ORANGE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

WIDTH, HEIGHT = 640, 420  # points
POINT = 6.0  # half the side of the square that a point keeps free, in points
FONT = 10.5
NEAR = 16.0  # a name that is farther away gets a line to its point, in points


@dataclass(frozen=True)
class Point:
    """A variant in the plot."""

    variant: str
    label: str
    memory: float
    """In units of the axis."""
    score: float
    """In per cent."""
    error: float
    base: str | None


def draw(summary: Summary, path: Path) -> bool:
    """Write `path`.svg and `path`.png.

    Returns:
        Whether there was anything to draw: two variants with an average and their memory.
    """
    unit, unit_name = _unit([line.memory for line in summary.lines if line.memory is not None])
    points = [_point(summary, line, unit) for line in summary.lines if _is_whole(line)]
    if len(points) < 2:
        return False
    with drawing():
        x = f"memory of a training step, {unit_name}"
        figure, axes = single(WIDTH, HEIGHT, x, "average score, %")
        _draw_pairs(axes, points)
        for point in points:
            _draw_point(axes, point)
        axes.margins(x=0.14, y=0.16)
        _explain_colours(axes)
        place_labels(figure, axes, points)
        write_figure(figure, path)
    return True


def _is_whole(line: Line) -> bool:
    return line.memory is not None and line.average is not None


def _point(summary: Summary, line: Line, unit: int) -> Point:
    assert line.memory is not None
    assert line.average is not None
    error = line.average.error or 0.0
    base = summary.bench.variant(line.variant).base
    memory, score = line.memory / unit, 100 * line.average.mean
    return Point(line.variant, line.label, memory, score, 100 * error, base)


def _unit(sizes: Sequence[float]) -> tuple[int, str]:
    largest = max(sizes, default=0)
    return (1024**3, "GiB") if largest >= 1024**3 else (1024**2, "MiB")


def _draw_pairs(axes: Axes, points: Sequence[Point]) -> None:
    by_name = {point.variant: point for point in points}
    for point in points:
        base = by_name.get(point.base or "")
        if base is not None:
            axes.plot(
                [base.memory, point.memory],
                [base.score, point.score],
                color=GREY,
                linewidth=1.4,
                zorder=2,
            )


def _draw_point(axes: Axes, point: Point) -> None:
    axes.errorbar(
        point.memory,
        point.score,
        yerr=point.error or None,
        fmt="o",
        color=_colour(point),
        markersize=7,
        capsize=3,
        elinewidth=1.3,
        zorder=3,
    )


def _explain_colours(axes: Axes) -> None:
    """Say above the plot what the two colours mean."""
    from matplotlib.lines import Line2D

    words = {ORANGE: "without VeLoRA", BLUE: "with VeLoRA"}
    marks = [Line2D([], [], color=c, marker="o", linestyle="", markersize=7) for c in words]
    axes.legend(
        marks,
        list(words.values()),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        frameon=False,
        borderaxespad=0.2,
    )


def _colour(point: Point) -> str:
    return BLUE if "velora" in point.variant or "coefficients" in point.variant else ORANGE


def place_labels(figure: Figure, axes: Axes, points: Sequence[Point]) -> list[Bbox]:
    """Write the names of the points where they cover neither each other nor a point.

    Returns:
        The boxes of the names, in pixels, in the order of the points.
    """
    figure.draw_without_rendering()  # fixes the layout and the limits
    axes.autoscale(enable=False)
    pixel = figure.dpi / 72
    taken = [_point_box(axes, point, POINT * pixel) for point in points]
    taken += _line_boxes(axes, points, pixel)
    boxes = []
    for point in points:
        at = axes.transData.transform((point.memory, point.score)).tolist()
        text = axes.text(point.memory, point.score, point.label, fontsize=FONT, parse_math=False)
        width, height = text.get_window_extent().size
        text.remove()
        options = [_box(at, offset, width, height, pixel) for offset in _offsets()]
        costs = [_cost(box, axes.bbox, taken) for box in options]
        best = costs.index(min(costs))
        dx, dy = _offsets()[best]
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
        taken.append(options[best])
        boxes.append(options[best])
    return boxes


_LEADER = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 5}


@functools.cache
def _offsets() -> list[tuple[float, float]]:
    """Where a name may be written, from its point, in points: the nearest places first."""
    sides = [(10.0, 0.0), (-10.0, 0.0), (0.0, 15.0), (0.0, -15.0)]
    diagonal = [(dx, dy) for dy in (11.0, -11.0) for dx in (9.0, -9.0)]
    far = [(dx, sign * dy) for dy in range(24, 110, 9) for sign in (1, -1) for dx in (0, 16, -16)]
    return [*sides, *diagonal, *far]


def _box(
    at: Sequence[float], offset: tuple[float, float], width: float, height: float, pixel: float
) -> Bbox:
    """The box of a name with this offset from its point, in pixels."""
    from matplotlib.transforms import Bbox

    dx, dy = offset
    x, y = at[0] + dx * pixel, at[1] + dy * pixel
    left = x if dx > 0 else x - width if dx < 0 else x - width / 2
    return Bbox.from_bounds(left, y - height / 2, width, height)


def _point_box(axes: Axes, point: Point, room: float) -> Bbox:
    """What a point and its error bar cover."""
    from matplotlib.transforms import Bbox

    x, low = axes.transData.transform((point.memory, point.score - point.error))
    _, high = axes.transData.transform((point.memory, point.score + point.error))
    return Bbox([[x - room, low - room], [x + room, high + room]])


def _line_boxes(axes: Axes, points: Sequence[Point], pixel: float) -> list[Bbox]:
    """Small boxes along the lines between pairs."""
    from matplotlib.transforms import Bbox

    by_name = {point.variant: point for point in points}
    boxes = []
    for point in points:
        base = by_name.get(point.base or "")
        if base is None:
            continue
        start = axes.transData.transform((base.memory, base.score))
        end = axes.transData.transform((point.memory, point.score))
        for step in range(1, 20):
            x, y = start + (end - start) * step / 20
            boxes.append(Bbox.from_bounds(x - pixel, y - pixel, 2 * pixel, 2 * pixel))
    return boxes


def _cost(box: Bbox, inside: Bbox, taken: Sequence[Bbox]) -> float:
    """Pixels of a box that are covered already or lie outside."""
    covered = sum(_common(box, other) for other in taken)
    return covered + 10 * (box.width * box.height - _common(box, inside))


def _common(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
