"""Means over tasks and seeds, and paired differences, with their standard errors.

The tasks of a bench are given, the seeds are a sample: standard errors say how far other seeds
would move a number, not other tasks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from velora_torch.bench.grid import Row

Scores = Mapping[str, Mapping[int, float]]
"""task -> seed -> score."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, which takes two numbers at least."""

    mean: float
    error: float | None = None


def by_variant(rows: Iterable[Row]) -> dict[str, dict[str, dict[int, float]]]:
    """Scores as variant -> task -> seed -> score."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        found.setdefault(row.variant, {}).setdefault(row.task, {})[row.seed] = row.score
    return found


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean of repetitions and its standard error s / √n; None without any."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean)
    return Estimate(mean, statistics.stdev(values) / math.sqrt(len(values)))


def average(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Mean over tasks; the standard errors of the tasks add up as those of independent numbers.

    None where a task is missing: such an average could not be compared with others.
    """
    known = [one for one in estimates if one is not None]
    if not known or len(known) < len(estimates):
        return None
    mean = statistics.fmean(one.mean for one in known)
    errors = [one.error for one in known if one.error is not None]
    if len(errors) < len(known):
        return Estimate(mean)
    return Estimate(mean, math.hypot(*errors) / len(errors))


def shared_tasks(scores: Mapping[str, Scores], tasks: Sequence[str]) -> list[str]:
    """The tasks that every variant has a score of."""
    return [task for task in tasks if all(task in own for own in scores.values())]


def average_over(scores: Scores, tasks: Sequence[str]) -> Estimate | None:
    """Average of a variant over tasks, each the mean over its seeds."""
    return average([estimate(list(scores.get(task, {}).values())) for task in tasks])


def difference(scores: Scores, base: Scores, tasks: Sequence[str]) -> Estimate | None:
    """Difference of two variants' averages, paired by task and seed."""
    pairs = []
    for task in tasks:
        own, other = scores.get(task, {}), base.get(task, {})
        seeds = sorted(own.keys() & other.keys())
        pairs.append(estimate([own[seed] - other[seed] for seed in seeds]))
    return average(pairs)


def verdict(gap: Estimate | None) -> str:
    """Whether a variant is within one standard error of its base, or better: yes, no, or "-".

    With one seed there is no standard error, and so no answer.
    """
    if gap is None:
        return "-"
    if gap.error is None:
        return "one seed"
    return "yes" if gap.mean >= -gap.error else "no"
