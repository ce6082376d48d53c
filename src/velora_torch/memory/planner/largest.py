"""The largest batch, or the longest sequence, that fits.

Each segment's peak is an affine function of the size (attention of the flash type keeps nothing
quadratic), up to the rounding of storages. So two sizes predict the largest, and simulating that
one and the next shows that it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from velora_torch.memory.planner.predictor import Predictor, Size
from velora_torch.memory.planner.search import Search
from velora_torch.memory.simulator.setup import Setup
from velora_torch.memory.simulator.simulate import Simulation

MOST_EXAMPLES = 65536
MOST_TOKENS = 2**20
TOKENS = 8
"""Sequences are multiples of so many tokens, as collators pad them."""


@dataclass(frozen=True)
class Axis:
    """What is made as large as it can be: ``count`` units."""

    name: str
    """``batch`` or ``seq``."""
    unit: int
    most: int
    """Units at most."""
    fixed: int | None
    """The other dimension."""

    def size(self, count: int) -> Size:
        """The micro-batch of so many units."""
        if self.name == "batch":
            return Size(count * self.unit, self.fixed)
        return Size(self.fixed, count * self.unit)

    @staticmethod
    def batch(seq: int | None) -> Axis:
        """Examples of a length."""
        return Axis("batch", 1, MOST_EXAMPLES, seq)

    @staticmethod
    def seq(batch: int, positions: int | None) -> Axis:
        """Tokens of each of so many examples."""
        return Axis("seq", TOKENS, max((positions or MOST_TOKENS) // TOKENS, 1), batch)


def ranked(search: Search, axis: Axis) -> Iterator[tuple[int, Setup]]:
    """Setups by the count that they are estimated to fit, the largest first.

    With fewer checkpoints no more fits, so a chain is followed only as far as it is asked for;
    and a setup that fits no more than one with fewer checkpoints is left out.
    """
    heap: list[tuple[int, int, list[Setup]]] = []

    def push(order: int, chain: list[Setup]) -> None:
        if chain and search.fits(chain[0]):
            count = estimate(search.predictor, chain[0], axis, search.budget)
            heapq.heappush(heap, (-count, order, chain))

    for order, chain in enumerate(search.chains()):
        push(order, chain)
    while heap:
        count, order, chain = heapq.heappop(heap)
        push(order, chain[1:])
        if not any(other[:2] == (count, order) for other in heap):
            yield -count, chain[0]


def estimate(predictor: Predictor, setup: Setup, axis: Axis, budget: int) -> int:
    """The largest count that two simulated sizes predict; at least 1, which fits."""
    first, second = _two(axis)
    if first == second:
        return axis.most
    small, large = (predictor.predict(setup, axis.size(n)) for n in (first, second))
    counts = [float(axis.most)]
    for name, total in large.segments.items():
        slope = (total - small.segments[name]) / (second - first)
        if slope > 0:
            counts.append(first + (budget - small.segments[name]) / slope)
    return max(1, int(min(counts)))


def largest(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest count that fits, from a guess; 1 is known to fit.

    Args:
        fits: whether a count fits; counts below one that fits do, too.
        guess: where to look first.
        most: the largest count allowed.
    """
    low, high = 1, most + 1
    count, step = min(max(guess, 1), most), 1
    while high - low > 1:
        if count <= low or count >= high:
            count = (low + high) // 2
        if fits(count):
            low, count = count, count + step
        else:
            high, count = count, count - step
        step *= 2
    return low


def verified(
    predict: Callable[[Setup, Size], Simulation | None],
    setup: Setup,
    axis: Axis,
    guess: int,
    budget: int,
) -> tuple[int, Simulation]:
    """The largest size of a setup (in examples or tokens) and its simulation."""

    def fits(count: int) -> bool:
        found = predict(setup, axis.size(count))
        return found is not None and found.peak_bytes <= budget

    count = largest(fits, guess, axis.most)
    found = predict(setup, axis.size(count))
    assert found is not None
    return count * axis.unit, found


def _two(axis: Axis) -> tuple[int, int]:
    """Two counts to predict from, large enough for what is cut into chunks."""
    second = min(16 if axis.name == "batch" else 128, axis.most)
    return max(second // 2, 1), second
