"""Three structured image tasks, drawn by a seeded generator.

They ask what VTAB's structured group asks: how many (Clevr-Count), where (dSprites-Location), at
which angle (dSprites-Orientation). Everything but the asked thing varies: colours, background,
size, shape, the other things in the scene.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Point = tuple[float, float]

_SHAPES = ("disc", "square", "triangle", "star", "cross", "ring")
_FINER = 2  # drawn so much larger and then reduced: smooth edges
_CELLS = 4  # a side of the grid of positions
_ANGLES = 12


@dataclass(frozen=True)
class Renderer:
    """Class names, and what draws one scene of a class; lengths are shares of the image's side."""

    classes: tuple[str, ...]
    draw: Callable[[_Canvas, int], None]


class _Canvas:
    """A square image with coordinates from 0 to 1, and the scene's source of chance."""

    def __init__(self, size: int, chance: np.random.Generator) -> None:
        from PIL import ImageDraw

        self.size, self.chance = size * _FINER, chance
        self.image = _background(self.size, chance)
        self.pen = ImageDraw.Draw(self.image)
        self.ground = self.image.resize((1, 1)).getpixel((0, 0))

    def uniform(self, low: float, high: float) -> float:
        return float(self.chance.uniform(low, high))

    def colour(self) -> tuple[int, ...]:
        """Draw a colour that stands out from the background."""
        while True:
            colour = tuple(int(c) for c in self.chance.integers(0, 256, 3))
            if sum(abs(a - b) for a, b in zip(colour, self.ground, strict=True)) > 180:
                return colour

    def polygon(self, points: list[Point], colour: tuple[int, ...]) -> None:
        self.pen.polygon([(x * self.size, y * self.size) for x, y in points], fill=colour)

    def disc(self, centre: Point, radius: float, colour: tuple[int, ...]) -> None:
        box = [(c + sign * radius) * self.size for sign in (-1, 1) for c in centre]
        self.pen.ellipse(box, fill=colour)

    def thing(self, shape: str, centre: Point, radius: float, colour: tuple[int, ...]) -> None:
        """Draw a shape that lies within `radius` of its centre, turned at random."""
        turn = self.uniform(0, 2 * math.pi)
        if shape in ("disc", "ring"):
            self.disc(centre, radius, colour)
            if shape == "ring":
                self.disc(centre, radius * 0.5, self.ground)
            return
        self.polygon([_at(centre, r * radius, a + turn) for r, a in _outline(shape)], colour)


def render(
    name: str, size: int, count: int, seed: tuple[object, ...]
) -> tuple[np.ndarray, list[int]]:
    """Draw `count` scenes of (size, size, 3) in uint8, and their labels, equally many of each.

    A scene depends on its task, `seed` and its place alone: fewer scenes are the first of more,
    and other seeds give other scenes.
    """
    import numpy as np
    from PIL import Image

    renderer = RENDERERS[name]
    entropy = zlib.crc32(repr((name, *seed)).encode())
    order = np.random.default_rng(entropy)
    labels: list[int] = []
    while len(labels) < count:
        labels += order.permutation(len(renderer.classes)).tolist()
    labels = labels[:count]
    images = np.empty((count, size, size, 3), np.uint8)
    for i, label in enumerate(labels):
        canvas = _Canvas(size, np.random.default_rng([entropy, i]))
        renderer.draw(canvas, label)
        images[i] = canvas.image.resize((size, size), Image.Resampling.BOX)
    return images, labels


def _count(canvas: _Canvas, label: int) -> None:
    """`label` + 1 things that do not touch each other."""
    for centre, radius in _apart(canvas, label + 1, 0.05, 0.11):
        canvas.thing(str(canvas.chance.choice(_SHAPES)), centre, radius, canvas.colour())


def _position(canvas: _Canvas, label: int) -> None:
    """A ring with a dot, its centre in one cell of the grid, and one to four other things."""
    row, column = divmod(label, _CELLS)
    radius = canvas.uniform(0.07, 0.10)
    centre = (_within(canvas, column, radius), _within(canvas, row, radius))
    others = int(canvas.chance.integers(1, 5))
    shapes = [s for s in _SHAPES if s not in ("disc", "ring")]
    for place, extent in _apart(canvas, others, 0.05, 0.10, taken=[(centre, radius)]):
        canvas.thing(str(canvas.chance.choice(shapes)), place, extent, canvas.colour())
    colour = canvas.colour()
    canvas.disc(centre, radius, colour)
    canvas.disc(centre, radius * 0.65, canvas.ground)
    canvas.disc(centre, radius * 0.35, colour)


def _orientation(canvas: _Canvas, label: int) -> None:
    """An arrow that points within 1/12 of a turn, counted clockwise from the right."""
    length, width = canvas.uniform(0.2, 0.36), canvas.uniform(0.025, 0.05)
    centre = (canvas.uniform(0.38, 0.62), canvas.uniform(0.38, 0.62))
    for place, extent in _apart(canvas, 2, 0.04, 0.07, taken=[(centre, length)]):
        canvas.thing(str(canvas.chance.choice(_SHAPES)), place, extent, canvas.colour())
    # Not up to the border of the bin: the neighbouring classes would look the same there.
    angle = 2 * math.pi * (label + canvas.uniform(-0.4, 0.4)) / _ANGLES
    across = angle + math.pi / 2

    def point(along: float, beside: float) -> Point:
        return _at(_at(centre, along, angle), beside, across)

    colour, neck, head = canvas.colour(), length * 0.3, width * 2.5
    canvas.polygon(
        [
            point(-length, -width),
            point(neck, -width),
            point(neck, -head),
            point(length, 0),
            point(neck, head),
            point(neck, width),
            point(-length, width),
        ],
        colour,
    )


RENDERERS: dict[str, Renderer] = {
    "count": Renderer(tuple(str(n) for n in range(1, 9)), _count),
    "position": Renderer(
        tuple(f"row {r + 1}, column {c + 1}" for r in range(_CELLS) for c in range(_CELLS)),
        _position,
    ),
    "orientation": Renderer(
        tuple(f"{360 * n // _ANGLES} degrees" for n in range(_ANGLES)), _orientation
    ),
}


def _within(canvas: _Canvas, cell: int, margin: float) -> float:
    """Draw a coordinate in a cell of the grid, off its borders and inside the image."""
    low, high = (cell + 0.1) / _CELLS, (cell + 0.9) / _CELLS
    return canvas.uniform(max(low, margin), min(high, 1 - margin))


def _apart(
    canvas: _Canvas,
    count: int,
    smallest: float,
    largest: float,
    taken: list[tuple[Point, float]] | None = None,
) -> list[tuple[Point, float]]:
    """Draw circles inside the image that touch neither each other nor those `taken`."""
    placed: list[tuple[Point, float]] = []
    gap = 0.015
    while len(placed) < count:
        radius = canvas.uniform(smallest, largest)
        low, high = radius + gap, 1 - radius - gap
        centre = (canvas.uniform(low, high), canvas.uniform(low, high))
        others = placed + (taken or [])
        if all(math.dist(centre, place) > radius + extent + gap for place, extent in others):
            placed.append((centre, radius))
    return placed


def _at(start: Point, distance: float, angle: float) -> Point:
    return start[0] + distance * math.cos(angle), start[1] + distance * math.sin(angle)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape as (distance from the centre, angle)."""
    turn = 2 * math.pi
    if shape == "star":
        return [(1.0 if k % 2 == 0 else 0.4, turn * k / 10) for k in range(10)]
    if shape == "cross":
        corner, tip = (0.42, turn / 8), (1.0, 0.3)
        return [
            place
            for k in range(4)
            for place in (
                (tip[0], turn * k / 4 - tip[1]),
                (tip[0], turn * k / 4 + tip[1]),
                (corner[0], turn * k / 4 + corner[1]),
            )
        ]
    corners = {"triangle": 3, "square": 4}[shape]
    return [(1.0, turn * k / corners) for k in range(corners)]


def _background(size: int, chance: np.random.Generator) -> Any:
    """A colour with soft noise at two scales."""
    import numpy as np
    from PIL import Image

    image = np.full((size, size, 3), chance.integers(40, 216, 3), np.float32)
    for grain, strength in ((6, 25.0), (28, 12.0)):
        noise = chance.normal(0, 1, (grain, grain)).astype(np.float32)
        soft = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        image += strength * np.asarray(soft)[..., None]
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))
