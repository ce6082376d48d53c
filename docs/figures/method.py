"""Draw docs/figures/method.svg: what the forward pass keeps, and what training does with it.

python docs/figures/method.py [FILE]      (needs matplotlib; the same file every time)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

T, G, M, O = 6, 4, 3, 5  # noqa: E741 - tokens, groups, sub-token size, output features
CELL = 0.26
INK, QUIET, PALE = "#1b1f24", "#59636e", "#eef1f4"
GROUPS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # one colour-blind-safe colour per group
VECTOR = (0.55, 1.0, 0.3)  # entries of v
GREYS = ("#aab2bb", "#7d8792", "#d3d9df")  # the same, drawn


def shade(row: int, column: int) -> float:
    """How strong an entry is drawn: anything that looks different from its neighbours."""
    return (0.85, 0.5, 0.25, 0.65, 0.4)[(2 * row + 3 * column) % 5]


def plain(row: int, column: int) -> str:
    """Colour of an entry that has no group."""
    return PALE


def entry_of_v(row: int, column: int) -> str:
    """Colour of an entry of v or e."""
    return GREYS[column]


def of_group(row: int, group: int) -> str:
    """Colour of an entry that stands for a whole group."""
    return blend(GROUPS[group], shade(row, group))


def in_group(row: int, column: int) -> str:
    """Colour of a feature."""
    return blend(GROUPS[column // M], shade(row, column))


def rank_one(row: int, column: int) -> str:
    """Colour of coef[row, group] * v[m]."""
    strength = shade(row, column // M) * VECTOR[column % M] / max(VECTOR)
    return blend(GROUPS[column // M], 0.08 + strength)


def blend(color: str, strength: float) -> str:
    """`color` on white."""
    parts = [255 - (255 - part) * min(strength, 1.0) for part in bytes.fromhex(color[1:])]
    return "#" + "".join(f"{round(part):02x}" for part in parts)


def matrix(
    axes: Axes,
    left: float,
    top: float,
    shape: tuple[int, int],
    name: str,
    color: Callable[[int, int], str],
    columns_between_lines: int | None = None,
) -> None:
    """A matrix of cells under its name."""
    rows, columns = shape
    for row in range(rows):
        for column in range(columns):
            corner = (left + column * CELL, top - (row + 1) * CELL)
            face = color(row, column)
            axes.add_patch(Rectangle(corner, CELL, CELL, facecolor=face, edgecolor="white", lw=0.8))
    for column in range(0, columns + 1, columns_between_lines or columns):
        x = left + column * CELL
        axes.plot([x, x], [top, top - rows * CELL], color=INK, linewidth=1.1)
    for y in (top, top - rows * CELL):
        axes.plot([left, left + columns * CELL], [y, y], color=INK, linewidth=1.1)
    axes.text(left + columns * CELL / 2, top + 0.13, name, ha="center", va="bottom", color=INK)


def arrow(axes: Axes, start: float, end: float, y: float) -> None:
    """An arrow from left to right."""
    style = "-|>,head_length=5,head_width=2.6"
    patch = FancyArrowPatch((start, y), (end, y), arrowstyle=style, color=INK, linewidth=1.2)
    axes.add_patch(patch)


def note(axes: Axes, x: float, y: float, text: str, **kwargs: str) -> None:
    """A quiet line of text, centred under something."""
    axes.text(x, y, text, **{"ha": "center", "va": "top", "color": QUIET, "size": 9.5} | kwargs)


def forward(axes: Axes, top: float) -> None:
    """x is split into sub-tokens; their projections z are what is stored."""
    bottom, middle = top - T * CELL, top - T * CELL / 2
    axes.text(0, middle, "forward", va="center", weight="bold", color=INK, size=12)
    matrix(axes, 1.35, top, (T, G * M), "$x$   (T × D)", in_group, M)
    note(axes, 1.35 + G * M * CELL / 2, bottom - 0.12, "each row: G sub-tokens of M features;")
    note(axes, 1.35 + G * M * CELL / 2, bottom - 0.36, "not kept by this layer")
    matrix(axes, 5.04, middle + 0.62, (1, M), "$v$   (M)", entry_of_v)
    arrow(axes, 4.72, 6.12, middle)
    note(axes, 5.42, middle - 0.12, r"$z_{tg}=\langle x_{tg},\,v\rangle$", size="11", color=INK)
    matrix(axes, 6.4, top, (T, G), "$z$   (T × G)", of_group, 1)
    note(axes, 6.4 + G * CELL / 2, bottom - 0.12, "stored: M times smaller")
    axes.text(8.45, middle + 0.16, r"$y = x\,W^\top$", va="center", color=INK, size=13)
    note(axes, 8.45, middle - 0.1, "exact, from the whole x", ha="left")


def backward(axes: Axes, top: float) -> None:
    """The factor C, and the fold of its update into the weight."""
    middle = top - O * CELL / 2
    axes.text(0, middle, "backward", va="center", weight="bold", color=INK, size=12)
    matrix(axes, 1.35, top, (O, T), r"$dY^\top$   (O × T)", plain)
    axes.text(3.11, middle, "×", ha="center", va="center", color=INK, size=13)
    matrix(axes, 3.32, top + CELL / 2, (T, G), "$z$   (T × G)", of_group, 1)
    arrow(axes, 4.72, 6.12, middle)
    matrix(axes, 6.4, top, (O, G), "$C$   (O × G)", of_group, 1)
    note(axes, 6.4 + G * CELL / 2, top - O * CELL - 0.12, "the gradient of coef")
    axes.text(8.45, middle + 0.16, r"$dX = dY\;W$", va="center", color=INK, size=13)
    note(axes, 8.45, middle - 0.1, "exact", ha="left")


def step(axes: Axes, top: float) -> None:
    """The optimizer moves coef, and the fold moves the weight."""
    bottom, middle = top - O * CELL, top - O * CELL / 2
    axes.text(0, middle, "step", va="center", weight="bold", color=INK, size=12)
    matrix(axes, 1.35, top, (O, G), "coef   (O × G)", of_group, 1)
    note(axes, 1.35 + G * CELL / 2, bottom - 0.12, "the optimizer’s update,")
    note(axes, 1.35 + G * CELL / 2, bottom - 0.36, "from C alone")
    axes.text(2.78, middle, r"$\otimes$", ha="center", va="center", color=INK, size=14)
    matrix(axes, 3.16, middle + CELL / 2, (1, M), "$e$   (M)", entry_of_v)
    note(axes, 3.16 + M * CELL / 2, middle - CELL / 2 - 0.1, "v or sign(v)")
    arrow(axes, 4.72, 6.12, middle)
    note(axes, 5.42, middle - 0.12, "fold", size="11", color=INK)
    matrix(axes, 6.4, top, (O, G * M), r"added to $W$   (O × D)", rank_one, M)
    note(axes, 6.4 + G * M * CELL / 2, bottom - 0.12, "then coef is zero again")


def draw(path: Path) -> None:
    """Write the figure."""
    settings = {"svg.hashsalt": "velora-torch", "font.size": 10.5, "mathtext.fontset": "cm"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10.2, 6.6), facecolor="white")
        axes = figure.add_axes((0.015, 0.01, 0.97, 0.98))
        axes.set_xlim(-0.05, 10.4)
        axes.set_ylim(-0.05, 6.85)
        axes.set_aspect("equal")
        axes.axis("off")
        forward(axes, 6.35)
        backward(axes, 3.7)
        step(axes, 1.75)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(path, format="svg", metadata=no_metadata)
    # Trailing blanks come from matplotlib's paths; without them the file is clean to commit.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).with_suffix(".svg")
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else here)
