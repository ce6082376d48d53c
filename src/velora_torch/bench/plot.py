"""Accuracy against memory: a point for each variant, joined with the one it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from velora_torch.bench.labels import place_labels
from velora_torch.bench.table import Line, Summary
from velora_torch.report.figures import single, write_figure
from velora_torch.report.inline_svg import BLUE, GREY, ORANGE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 640, 420  # points


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
            draw_point(axes, point)
        axes.margins(x=0.14, y=0.16)
        explain_colours(axes)
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


def draw_point(axes: Axes, point: Point) -> None:
    """A mark with its error bar."""
    axes.errorbar(
        point.memory,
        point.score,
        yerr=point.error or None,
        fmt="o",
        color=colour_of(point.variant),
        markersize=7,
        capsize=3,
        elinewidth=1.3,
        zorder=3,
    )


def explain_colours(axes: Axes) -> None:
    """Say above the plot what the two colours mean, and what lines with a label are."""
    from matplotlib.lines import Line2D

    words = {ORANGE: "without VeLoRA", BLUE: "with VeLoRA"}
    marks = [Line2D([], [], color=c, marker="o", linestyle="", markersize=7) for c in words]
    lines, names = axes.get_legend_handles_labels()
    axes.legend(
        [*marks, *lines],
        [*words.values(), *names],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
        borderaxespad=0.2,
    )


def colour_of(variant: str) -> str:
    """Whether a variant, by its name, compresses."""
    return BLUE if "velora" in variant or "coefficients" in variant else ORANGE
