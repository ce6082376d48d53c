"""The figures of the report: each function returns an `<svg>` element, or "" for lack of data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from velora_torch.report.inline_svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    YELLOW,
    drawing,
    inline_svg,
    printable,
)
from velora_torch.report.quantities import format_bytes, format_loss, format_seconds
from velora_torch.report.results import Memory, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CATEGORIES = {  # field of Memory -> what the legend calls it, and its colour
    "weights": ("weights", GREY),
    "saved_activations": ("saved activations", BLUE),
    "gradients": ("gradients", YELLOW),
    "optimizer_state": ("optimizer state", GREEN),
}
_MOST_POINTS = 400  # of a curve; a longer history is averaged down to this many
_POINTS_TO_SMOOTH = 30  # a shorter history is drawn as it is


def loss_curve(results: Results, *, width: int = 760, height: int = 300) -> str:
    """Training loss by step with the evaluations on top of it."""
    points = [(point.step, _number(point.loss)) for point in results.history]
    evaluated = [(e.step, e.loss) for e in results.evaluations if math.isfinite(_number(e.loss))]
    finite = [loss for _, loss in points if math.isfinite(loss)]
    if not finite and not evaluated:
        return ""
    with drawing():
        figure, axes = _figure(width, height)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        _integer_steps(axes, [step for step, _ in points + evaluated], width)
        if finite:
            _training_curve(axes, points)
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), "o", color=ORANGE, label="held-out loss")
            step, loss = evaluated[-1]
            axes.annotate(
                format_loss(loss),
                (step, loss),
                xytext=(0, 9),
                textcoords="offset points",
                ha="right",
                color=INK,
                weight="bold",
            )
        axes.margins(y=0.12)
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.6, columnspacing=1.4)
        story = f"training loss from {_first_to_last(finite)}" if finite else "held-out loss"
        return inline_svg(figure, f"loss{width}", f"Loss by training step: {story}.")


def memory_bars(results: Results, *, width: int = 400) -> str:
    """Bytes of one step by category: a stacked bar for each variant, or for this run alone."""
    bars = [(row.variant, row.memory) for row in results.compare]
    if not bars and results.memory is not None:
        bars = [("this run", results.memory)]
    bars = [(name, memory) for name, memory in bars if any(_parts(memory))]
    if not bars:
        return ""
    unit, unit_name = _byte_unit(max(sum(_parts(memory)) for _, memory in bars))
    with drawing():
        figure, axes = _bar_figure(width, [name for name, _ in bars], legend_rows=2)
        for index, (field, (label, color)) in enumerate(CATEGORIES.items()):
            sizes = [_parts(memory)[index] / unit for _, memory in bars]
            before = [sum(_parts(memory)[:index]) / unit for _, memory in bars]
            if all(getattr(memory, field) is None for _, memory in bars):
                continue
            axes.barh(range(len(bars)), sizes, 0.56, left=before, color=color, label=label)
        for row, (_, memory) in enumerate(bars):
            total = sum(_parts(memory))
            _bar_label(axes, total / unit, row, format_bytes(total))
        axes.set_xlim(0, 1.24 * max(sum(_parts(memory)) for _, memory in bars) / unit)
        axes.set_xlabel(unit_name)
        figure.legend(loc="outside upper left", ncols=2, handlelength=0.9, columnspacing=1.4)
        story = ", ".join(f"{printable(n)} {format_bytes(sum(_parts(m)))}" for n, m in bars)
        return inline_svg(figure, "memory", f"Memory of one training step: {story}.")


def step_time_bars(results: Results, *, width: int = 400) -> str:
    """Median seconds of a step for each variant, with the fastest and the slowest repeat."""
    timed = [(row.variant, row.seconds) for row in results.compare if row.seconds is not None]
    timed = [(name, seconds) for name, seconds in timed if math.isfinite(seconds.median)]
    if not timed:
        return ""
    slowest = max(max(seconds.median, _number(seconds.high, 0.0)) for _, seconds in timed)
    unit, unit_name = (1.0, "seconds") if slowest >= 1 else (1e-3, "milliseconds")
    with drawing():
        figure, axes = _bar_figure(width, [name for name, _ in timed], legend_rows=0)
        for row, (_, seconds) in enumerate(timed):
            low = min(_number(seconds.low, seconds.median), seconds.median)
            high = max(_number(seconds.high, seconds.median), seconds.median)
            color = GREY if row == 0 and len(timed) > 1 else BLUE
            axes.barh(row, seconds.median / unit, 0.56, color=color)
            axes.plot([low / unit, high / unit], [row, row], color=INK, linewidth=1.4)
            axes.plot([low / unit, high / unit], [row, row], "|", color=INK, markersize=8)
            _bar_label(axes, high / unit, row, format_seconds(seconds.median))
        axes.set_xlim(0, 1.24 * slowest / unit)
        axes.set_xlabel(f"{unit_name}, median with fastest and slowest")
        story = ", ".join(f"{printable(n)} {format_seconds(s.median)}" for n, s in timed)
        return inline_svg(figure, "time", f"Time of one training step: {story}.")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many points; nothing of pyplot's global state is touched."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72)
    figure = Figure(figsize=(width / 72, height / 72), layout=layout)
    return figure, figure.add_subplot()


def _bar_figure(width: float, names: Sequence[str], legend_rows: int) -> tuple[Figure, Axes]:
    """Axes for horizontal bars, one under another, with their names on the left."""
    figure, axes = _figure(width, 56 + 46 * len(names) + 20 * legend_rows)
    labels = [printable(name, 22) for name in names]
    axes.set_yticks(range(len(names)), labels, color=INK, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first name at the top
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)
    return figure, axes


def _bar_label(axes: Axes, end: float, row: float, text: str) -> None:
    axes.annotate(
        text,
        (end, row),
        xytext=(7, 0),
        textcoords="offset points",
        va="center_baseline",
        color=INK,
        weight="bold",
    )


def _training_curve(axes: Axes, points: Sequence[tuple[int, float]]) -> None:
    steps, losses = _thinned(points)
    if len(steps) < _POINTS_TO_SMOOTH:
        marker = "o" if len(steps) <= 12 else None
        axes.plot(steps, losses, color=BLUE, marker=marker, markersize=4, label="training loss")
        return
    axes.plot(steps, losses, color=BLUE, alpha=0.5, linewidth=1, label="training loss")
    axes.plot(steps, _smooth(losses), color=BLUE, linewidth=2, label="smoothed")


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and losses; means of equal runs of points where there are too many to draw."""
    run = -(-len(points) // _MOST_POINTS)
    steps, losses = [], []
    for start in range(0, len(points), run):
        chunk = points[start : start + run]
        known = [loss for _, loss in chunk if math.isfinite(loss)]
        steps.append(sum(step for step, _ in chunk) / len(chunk))
        losses.append(sum(known) / len(known) if known else math.nan)
    return steps, losses


def _smooth(losses: Sequence[float]) -> list[float]:
    """Mean over a window around each point; it narrows towards both ends, so as not to lag."""
    reach = max(2, len(losses) // 30)
    smoothed = []
    for i in range(len(losses)):
        near = min(reach, i, len(losses) - 1 - i)
        known = [loss for loss in losses[i - near : i + near + 1] if math.isfinite(loss)]
        smoothed.append(sum(known) / len(known) if known else math.nan)
    return smoothed


def _integer_steps(axes: Axes, steps: Sequence[int], width: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=max(3, width // 90)))
    low, high = min(steps), max(steps)
    room = max(1.0, 0.02 * (high - low)) if low == high else 0.02 * (high - low)
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _first_to_last(losses: Sequence[float]) -> str:
    return f"{format_loss(losses[0])} to {format_loss(losses[-1])}"


def _parts(memory: Memory) -> list[int]:
    """The four categories in the order of `CATEGORIES`, 0 where one was not measured."""
    return [getattr(memory, field) or 0 for field in CATEGORIES]


def _byte_unit(largest: int) -> tuple[int, str]:
    """The unit in which the largest bar is a number of one to three digits."""
    for power, unit_name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return 1024**power, unit_name
    return 1, "bytes"


def _number(value: float | None, instead: float = math.nan) -> float:
    """`value`, or `instead` where it is missing or not finite."""
    return instead if value is None or not math.isfinite(value) else value
