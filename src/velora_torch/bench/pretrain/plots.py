"""Perplexity against tokens, against the memory of a whole step, and against time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from velora_torch.bench.labels import place_labels
from velora_torch.bench.plot import (
    HEIGHT,
    WIDTH,
    Point,
    colour_of,
    draw_point,
    explain_colours,
)
from velora_torch.bench.pretrain.table import Line
from velora_torch.report.figures import single, write_figure
from velora_torch.report.inline_svg import GREY, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
PERPLEXITY = "held-out perplexity"
MANY = 20
"""So many methods have room for their names; more need a larger figure."""


def draw(lines: Sequence[Line], task: str, output: Path) -> dict[str, str]:
    """Write the plots of one size as PNG and SVG.

    Returns:
        The PNG files' names, each with what it shows; plots without two points are left out.
    """
    plots = {
        f"{task}_tokens": ("perplexity against tokens", _against_tokens),
        f"{task}_memory": ("perplexity against the memory of a step", _against_memory),
        f"{task}_time": ("perplexity against training time", _against_time),
    }
    drawn = {}
    for name, (words, make) in plots.items():
        with drawing():
            figure = make(lines)
            if figure is not None:
                write_figure(figure, output / name)
                drawn[f"{name}.png"] = f"{task}: {words}"
    return drawn


def _against_tokens(lines: Sequence[Line]) -> Figure | None:
    """A curve for each method; names in a legend, the best at the end on top."""
    from matplotlib.ticker import LogFormatter

    with_curve = [line for line in lines if len(line.curve) > 1]
    if not with_curve:
        return None
    figure, axes = _figure(len(with_curve), "million tokens")
    ordered = sorted(with_curve, key=lambda line: line.curve[-1][1])
    marks = "osD^v<>P*Xhd"
    for number, line in enumerate(ordered):
        tokens, values = zip(*line.curve, strict=True)
        axes.plot(
            [t / 1e6 for t in tokens],
            values,
            color=colour_of(line.variant.name),
            alpha=0.85,
            linewidth=1.3,
            marker=marks[number % len(marks)],
            markersize=4,
            label=f"{line.variant.label}: {values[-1]:.1f}",
        )
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(LogFormatter(minor_thresholds=(2, 0.5)))  # 60, not 6 x 10^1
    axes.legend(loc="upper right", frameon=False, fontsize=7.5, ncols=2)
    return figure


def _against_memory(lines: Sequence[Line]) -> Figure | None:
    values = {line.variant.name: line.peak for line in lines}
    return _points(lines, values, MIB, "peak of a training step, MiB")


def _against_time(lines: Sequence[Line]) -> Figure | None:
    values = {line.variant.name: line.train_seconds for line in lines}
    return _points(lines, values, 60.0, "time of all steps, minutes")


def _points(
    lines: Sequence[Line], values: dict[str, float | None], unit: float, name: str
) -> Figure | None:
    points = []
    for line in lines:
        value = values[line.variant.name]
        if value is not None and line.perplexity is not None:
            error = line.perplexity.error or 0.0
            at = (value / unit, line.perplexity.mean)
            points.append(Point(line.variant.name, line.variant.label, *at, error, None))
    if len(points) < 2:
        return None
    figure, axes = _figure(len(points), name)
    for point in points:
        draw_point(axes, point)
    axes.margins(x=0.2, y=0.16)
    corners = _frontier(points)
    axes.plot(
        *zip(*corners, strict=True),
        color=GREY,
        linewidth=1.0,
        linestyle=(0, (3, 3)),
        zorder=1.5,
        label="Pareto frontier",
    )
    explain_colours(axes)
    place_labels(figure, axes, points, list(pairwise(corners)))
    return figure


def _figure(methods: int, x: str) -> tuple[Figure, Axes]:
    size = 1.0 if methods <= MANY else 1.35
    return single(size * WIDTH, size * HEIGHT, x, PERPLEXITY)


def _frontier(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Corners of the line below and left of which there is no point."""
    corners: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point.memory, point.score)):
        if not corners:
            corners.append((point.memory, point.score))
        elif point.score < corners[-1][1]:
            corners += [(point.memory, corners[-1][1]), (point.memory, point.score)]
    return corners
