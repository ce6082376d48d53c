"""Bars of each model's variants: the time of a step over that of the first variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora_torch.bench.speed.cases import Case
from velora_torch.bench.speed.rows import SpeedRow
from velora_torch.bench.speed.table import Found, newest
from velora_torch.bench.speed.variants import variants_of
from velora_torch.report.figures import blank, write_figure
from velora_torch.report.inline_svg import BLUE, GREY, INK, ORANGE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 560  # points
BAR, HEAD = 20, 44  # height of a bar and of a panel's title, in points
COLOURS = {"plain": GREY, "peer": ORANGE, "ours": BLUE}
WORDS = {"plain": "without VeLoRA", "peer": "VeLoRA of others", "ours": "ours"}
FONT = 9.5


def draw(found: Found, cases: Sequence[Case], path: Path) -> bool:
    """Write `path`.svg and `path`.png: a panel for each model that has been timed.

    Returns:
        Whether there was anything to draw: a model with two variants.
    """
    models = [case for case in cases if case.level == "model" and len(found.get(case.name, ())) > 1]
    if not models:
        return False
    rows = {case.name: newest(found[case.name]) for case in models}
    heights = [BAR * len(rows[case.name]) + HEAD for case in models]
    with drawing():
        figure = blank(WIDTH, sum(heights) + HEAD)
        panels = figure.subplots(len(models), squeeze=False, height_ratios=heights)[:, 0]
        for axes, case in zip(panels, models, strict=True):
            _panel(axes, case, rows[case.name])
        words = "time of a step over the first variant's; line: quartiles"
        panels[-1].set_xlabel(words, fontsize=FONT)
        _explain_colours(panels[0])
        write_figure(figure, path)
    return True


def _panel(axes: Axes, case: Case, rows: Mapping[str, SpeedRow]) -> None:
    shown = [variant for variant in variants_of(case) if variant.name in rows]
    longest = max(row.ratio_upper for row in rows.values())
    for place, variant in enumerate(shown):
        row = rows[variant.name]
        errors = [[row.ratio - row.ratio_lower], [row.ratio_upper - row.ratio]]
        axes.barh(place, row.ratio, height=0.7, color=COLOURS[variant.side])
        axes.errorbar(row.ratio, place, xerr=errors, color=INK, elinewidth=1.1, capsize=2)
        inside: dict[str, Any] = {"va": "center_baseline", "color": "white", "parse_math": False}
        axes.text(0.012 * longest, place, f"{row.ratio:.2f}×", fontsize=FONT, **inside)
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_xlim(0, 1.04 * max(1.0, longest))
    axes.set_yticks(range(len(shown)), [variant.label for variant in shown], fontsize=FONT)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.set_title(case.about, loc="left", fontsize=10.5, color=INK)


def _explain_colours(axes: Axes) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        [Patch(color=COLOURS[side]) for side in WORDS],
        list(WORDS.values()),
        loc="lower right",
        bbox_to_anchor=(1, 1.12),
        ncols=3,
        fontsize=FONT,
        borderaxespad=0,
    )
