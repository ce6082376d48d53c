"""Steps timed in turn, A B C, B C A, C A B: what drifts in a machine meets all of them alike.

The order rotates from round to round, since the first of a round pays for what the last one has
left behind: memory that goes back to the system and comes back as fresh pages.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Step = Callable[[], None]
Clock = Callable[[], float]
"""Seconds since whenever."""


def interleave(
    steps: Sequence[Step],
    rounds: int,
    warmups: int = 1,
    clock: Clock = time.perf_counter,
    after_round: Callable[[int], None] = lambda number: None,
) -> list[list[float]]:
    """Time steps in turn; round r begins with step r modulo their number.

    Python's garbage is collected between the rounds and not within them: a collection would be
    charged to whichever step it falls into.

    Args:
        steps: what to time.
        rounds: timed rounds.
        warmups: rounds before them that do not count, in the given order.
        clock: seconds since whenever.
        after_round: is told how many timed rounds are over.

    Returns:
        The seconds of each step, one number for each round.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    with _no_collections():
        for _ in range(warmups):
            for step in steps:
                step()
        for number in range(rounds):
            gc.collect()
            for index in rotated(len(steps), number):
                start = clock()
                steps[index]()
                seconds[index].append(clock() - start)
            after_round(number + 1)
    return seconds


def rotated(count: int, by: int) -> list[int]:
    """0, 1, ..., count - 1, beginning with number ``by`` modulo ``count``."""
    return [(by + index) % count for index in range(count)]


@dataclass(frozen=True)
class Spread:
    """A median, and how far the numbers around it lie."""

    median: float
    low: float
    lower_quartile: float
    upper_quartile: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, extremes and quartiles (inclusive: the extremes are the 0th and 100th percentile)."""
    if len(values) == 1:
        return Spread(*[values[0]] * 5)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, min(values), lower, upper, max(values))


def ratios(seconds: Sequence[float], base: Sequence[float]) -> list[float]:
    """A step's time over another's, round by round: a slow minute slows both.

    Raises:
        ValueError: they were not timed in the same rounds.
    """
    if len(seconds) != len(base):
        raise ValueError(f"{len(seconds)} rounds cannot be compared with {len(base)}")
    return [one / other for one, other in zip(seconds, base, strict=True)]


@contextmanager
def _no_collections() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
