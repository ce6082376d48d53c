"""The plots of an analysis, each as .svg and .png."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora_torch.analysis.results import Analysis, Curve, Projection, choices_of
from velora_torch.analysis.rows import mean
from velora_torch.analysis.summary import common_groups, label_of, middle
from velora_torch.report.figures import blank, write_figure
from velora_torch.report.inline_svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    YELLOW,
    drawing,
    printable,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 720  # points
MOST_KINDS = 12
"""Kinds of layers that are drawn; the others are in the tables."""
COLOURS = {  # way to choose v -> colour; a full mark for one shared vector, an empty one per group
    "average": BLUE,
    "running_average": GREEN,
    "batch_average": YELLOW,
    "random": GREY,
    "rademacher": PURPLE,
    "svd": ORANGE,
}
_KIND_COLOURS = (BLUE, ORANGE, GREEN, YELLOW, GREY, INK)
_MARKERS = "osD^vP*X"


def draw_all(analysis: Analysis, folder: Path) -> list[str]:
    """Write every plot that there are data for.

    Returns:
        Names of the .png files.
    """
    plots: dict[str, Callable[[Analysis], Figure]] = {
        "stable_rank": stable_rank,
        "similarity": similarity,
        "layers": layers,
        "cosine": cosine,
    }
    with drawing():
        for name, draw in plots.items():
            write_figure(draw(analysis), folder / name)
    return [f"{name}.png" for name in plots]


def stable_rank(analysis: Analysis) -> Figure:
    """Figure 2a: stable rank of all sub-tokens against the number of groups, by kind of layer.

    Kinds with the same input share a line. Dashed: the same at the last step, where there is
    another than the first.
    """
    figure, (axes,) = _figure(400, 1)
    axes.set_xlabel("groups")
    axes.set_ylabel("stable rank of all sub-tokens")
    _groups_axis(axes, analysis.groups)
    ends = list(dict.fromkeys((analysis.steps[0], analysis.steps[-1])))
    sharing: dict[tuple[tuple[float, ...], ...], list[str]] = {}
    for kind in analysis.kinds[:MOST_KINDS]:
        lines = tuple(tuple(_ranks(analysis, kind, step)) for step in ends)
        sharing.setdefault(lines, []).append(kind)
    for number, (lines, kinds) in enumerate(sharing.items()):
        style = {
            "color": _KIND_COLOURS[number % len(_KIND_COLOURS)],
            "marker": _MARKERS[number // len(_KIND_COLOURS)],
        }
        labels = (printable(", ".join(kinds), 40), None)
        for ranks, line, label in zip(lines, ("-", "--"), labels, strict=False):
            points = list(zip(analysis.groups, ranks, strict=True))
            _line(axes, points, linestyle=line, label=label, **style)
    axes.set_ylim(bottom=0)
    title = f"step {ends[0]}" + (f" (dashed: step {ends[1]})" if len(ends) > 1 else "")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    figure.legend(loc="outside upper left", ncols=3, fontsize=10.5)
    return figure


def _ranks(analysis: Analysis, kind: str, step: int) -> list[float]:
    """Mean stable rank of a kind of layers for each number of groups; -1 where there is none."""
    kind_of = analysis.kind_of
    rows = [row for row in analysis.ranks if row.step == step and kind_of[row.layer] == kind]
    means = [mean([row.shared for row in rows if row.groups == n]) for n in analysis.groups]
    return [rank if math.isfinite(rank) else -1.0 for rank in means]  # NaN is not equal to itself


def similarity(analysis: Analysis) -> Figure:
    """Figure 2b: share of similarities that change by at least k, measured and predicted."""
    groups, step = middle(analysis), analysis.steps[-1]
    curves = [c for c in analysis.curves if (c.groups, c.step) == (groups, step)]
    columns = len({curve.init for curve in curves})
    figure, panels = _figure(440, 2, columns)  # a row for shared vectors, one for those per group
    for axes, curve in zip(panels, curves, strict=True):
        _similarity_panel(axes, analysis.thresholds, curve)
    panels[0].set_ylabel("share, shared v")
    panels[columns].set_ylabel("share, v per group")
    figure.supxlabel(f"similarity changes by at least k; {groups} groups, step {step}", fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def _similarity_panel(axes: Axes, thresholds: Sequence[float], curve: Curve) -> None:
    axes.plot(thresholds, curve.pairs, color=BLUE, label="two sub-tokens, measured")
    axes.plot(thresholds, curve.single, color=GREEN, label="one with itself, measured")
    axes.plot(thresholds, curve.predicted, "--", color=ORANGE, label="predicted: 2(1 − Φ(√k/σ))")
    axes.set_title(label_of(curve.init, "shared"), loc="left", fontsize=11, color=INK)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_ylim(0, 1.03)


def layers(analysis: Analysis) -> Figure:
    """Cosine and energy by kind of layer, a mark for each choice of v."""
    groups, step = middle(analysis), analysis.steps[-1]
    rows = [r for r in analysis.projections if (r.groups, r.step) == (groups, step)]
    kinds, kind_of = analysis.kinds[:MOST_KINDS], analysis.kind_of
    figure, panels = _figure(120 + 34 * len(kinds), 1, 2)
    titles = {"cosine": "cosine of the gradient", "energy": "energy of the input kept"}
    for axes, (field, title) in zip(panels, titles.items(), strict=True):
        for init, vectors in choices_of(rows):
            own = [row for row in rows if (row.init, row.vectors) == (init, vectors)]
            shift = 0.15 if vectors == "per_group" else -0.15
            for place, kind in enumerate(kinds):
                value = mean([getattr(r, field) for r in own if kind_of[r.layer] == kind])
                axes.plot(value, place + shift, **_mark(init, vectors))
        axes.set_ylim(len(kinds) - 0.5, -0.5)  # the first kind at the top
        axes.set_xlim(-0.03, 1.03)
        axes.set_title(f"{title}, {groups} groups, step {step}", loc="left", fontsize=11, color=INK)
        axes.set_yticks(range(len(kinds)), [""] * len(kinds))
        axes.tick_params(axis="y", length=0)
    names = [printable(kind, 28) for kind in kinds]
    panels[0].set_yticks(range(len(kinds)), names, color=INK, parse_math=False)
    _explain_marks(figure, rows)
    return figure


def cosine(analysis: Analysis) -> Figure:
    """Cosine, mean of all layers: against the number of groups, and over training."""
    several = len(analysis.steps) > 1
    figure, panels = _figure(360, 1, 2 if several else 1)
    last = [row for row in analysis.projections if row.step == analysis.steps[-1]]
    panels[0].set_xlabel("groups")
    panels[0].set_ylabel("cosine of exact and compressed gradient")
    groups = common_groups(analysis)
    _groups_axis(panels[0], groups)
    title = f"step {analysis.steps[-1]}"
    panels[0].set_title(title, loc="left", fontsize=11, color=INK)
    _cosines(panels[0], last, "groups", groups)
    if several:
        shown = middle(analysis)
        rows = [row for row in analysis.projections if row.groups == shown]
        panels[1].set_xlabel("training step")
        panels[1].set_title(f"{shown} groups", loc="left", fontsize=11, color=INK)
        panels[1].locator_params(axis="x", integer=True, nbins=6)
        _cosines(panels[1], rows, "step", analysis.steps)
    _explain_marks(figure, last)
    return figure


def _cosines(axes: Axes, rows: Sequence[Projection], field: str, places: Sequence[int]) -> None:
    for init, vectors in choices_of(rows):
        own = [row for row in rows if (row.init, row.vectors) == (init, vectors)]
        points = [
            (place, mean([row.cosine for row in own if getattr(row, field) == place]))
            for place in places
        ]
        line = "-" if vectors == "shared" else "--"
        _line(axes, points, **_mark(init, vectors) | {"linestyle": line})
    axes.set_ylim(0, 1.03)


def _mark(init: str, vectors: str) -> dict[str, Any]:
    colour = COLOURS[init]
    face = colour if vectors == "shared" else "white"
    return {
        "color": colour,
        "marker": "o",
        "markersize": 6,
        "markerfacecolor": face,
        "linestyle": "",
    }


def _explain_marks(figure: Figure, rows: Sequence[Projection]) -> None:
    """Say above a figure what colours and marks mean."""
    from matplotlib.lines import Line2D

    inits = dict.fromkeys(row.init for row in rows)
    marks = {label_of(init, "shared"): _mark(init, "shared") for init in inits}
    for vectors, words in (("shared", "shared v"), ("per_group", "v per group")):
        marks[words] = _mark("random", vectors) | {"color": INK, "markeredgecolor": INK}
        if vectors == "shared":
            marks[words]["markerfacecolor"] = INK
    lines = [Line2D([], [], **mark) for mark in marks.values()]
    figure.legend(
        lines,
        list(marks),
        loc="outside upper left",
        ncols=len(marks),
        fontsize=10,
        handletextpad=0.2,
        columnspacing=1.0,
    )


def _line(axes: Axes, points: Sequence[tuple[float, float]], **settings: Any) -> None:
    known = [(x, y) for x, y in points if math.isfinite(y) and y >= 0]
    if known:
        axes.plot(*zip(*known, strict=True), **{"markersize": 5, "linewidth": 1.6} | settings)


def _groups_axis(axes: Axes, groups: Sequence[int]) -> None:
    """Numbers of groups at equal distances for equal factors."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(groups), [str(count) for count in groups])
    axes.minorticks_off()


def _figure(height: float, rows: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, row by row."""
    figure = blank(WIDTH, height)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=columns > 2)
    return figure, list(panels.flat)
