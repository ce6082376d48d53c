"""A picture of a ledger: saved activations by kind of layer, plain and compressed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from velora_torch.report.quantities import format_bytes

if TYPE_CHECKING:
    from velora_torch.memory.ledger.ledger import WhatIf

FORMATS = (".png", ".svg")
MOST_KINDS = 9
"""Bars of their own; the smaller kinds are summed up in one more."""
_WIDTH = 640  # points
_BAR = 0.36


def check_chart(path: Path) -> Path:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        ValueError: the name ends in neither .png nor .svg.
        FileNotFoundError: the folder does not exist.
        ImportError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"a chart is a file ending in .png or .svg, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write the chart {path.name} into")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a chart needs matplotlib: pip install 'velora-torch[train]'") from error
    return path


def draw(what_if: WhatIf, path: Path, title: str) -> Path:
    """Draw horizontal bars by kind of layer, plain next to compressed, into a file.

    Args:
        what_if: what is drawn.
        path: ends in ``.png`` or ``.svg``; written over.
        title: of the figure.
    """
    from velora_torch.report.inline_svg import BLUE, GREY, INK, QUIET, drawing, printable
    from velora_torch.report.plots import _bar_figure, _bar_label, _byte_unit

    check_chart(path)
    before, after = what_if.before.by_layer_kind(), what_if.after.by_layer_kind()
    kinds = _kinds(before, after)
    unit, unit_name = _byte_unit(max(max(pair) for _, pair in kinds))
    with drawing():
        figure, axes = _bar_figure(_WIDTH, [kind for kind, _ in kinds], legend_rows=2)
        for series, (label, color) in enumerate((("plain", GREY), ("VeLoRA", BLUE))):
            middles = [row + (series - 0.5) * (_BAR + 0.04) for row in range(len(kinds))]
            sizes = [pair[series] for _, pair in kinds]
            total = sum(sizes)
            axes.barh(
                middles,
                [size / unit for size in sizes],
                _BAR,
                color=color,
                label=f"{label}, {format_bytes(total)}",
            )
            for middle, size in zip(middles, sizes, strict=True):
                _bar_label(axes, size / unit, middle, format_bytes(size))
        axes.set_xlim(0, 1.18 * max(max(pair) for _, pair in kinds) / unit)
        axes.grid(visible=False)  # each bar has its number
        axes.set_xlabel(f"saved activations by kind of layer, {unit_name}", color=QUIET)
        figure.suptitle(
            printable(title, 80), x=0.01, ha="left", color=INK, weight="bold", parse_math=False
        )
        figure.legend(loc="outside lower left", ncols=2, handlelength=0.9, columnspacing=1.4)
        figure.savefig(
            path,
            dpi=160,
            facecolor="white",
            bbox_inches="tight",
            pad_inches=0.12,
            metadata={"Date": None} if path.suffix.lower() == ".svg" else None,  # the same file
        )
    return path


def _kinds(before: dict[str, int], after: dict[str, int]) -> list[tuple[str, tuple[int, int]]]:
    """Kinds of layers with their bytes, largest first; the smallest ones together."""
    pairs = {kind: (before.get(kind, 0), after.get(kind, 0)) for kind in {**before, **after}}
    ordered = sorted(pairs.items(), key=lambda item: (-max(item[1]), item[0]))
    rest = [pair for _, pair in ordered[MOST_KINDS:]]
    if rest:
        summed = (sum(pair[0] for pair in rest), sum(pair[1] for pair in rest))
        return [*ordered[:MOST_KINDS], (f"{len(rest)} other kinds", summed)]
    return ordered
