"""Figures that are written as files, each as .svg and .png."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from velora_torch.atomic import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
"""Of a .png; figures are measured in points, 72 to an inch."""


def blank(width: float, height: float) -> Figure:
    """A figure without panels, in points; nothing of pyplot's global state is touched."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=6 / 72, h_pad=6 / 72)
    return Figure(figsize=(width / 72, height / 72), layout=layout)


def single(width: float, height: float, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one panel.

    Args:
        width: in points.
        height: in points.
        x: what its axis shows.
        y: what its axis shows.
    """
    figure = blank(width, height)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def write_figure(figure: Figure, path: Path) -> None:
    """Write `path`.svg and `path`.png, each whole or not at all."""
    for suffix, settings in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": DPI})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, facecolor="white", **settings)
        write_whole(path.with_suffix(f".{suffix}"), buffer.getvalue())
