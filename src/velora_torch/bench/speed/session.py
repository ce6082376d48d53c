"""One case: all its variants are prepared, timed in turn, and become rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from velora_torch.bench.interleave import Clock, Step, interleave
from velora_torch.bench.runner import FAILURES, first_line
from velora_torch.bench.speed.cases import Case
from velora_torch.bench.speed.parts import prepare_part
from velora_torch.bench.speed.prepare import Prepared, prepare
from velora_torch.bench.speed.rows import SpeedRow, make_rows
from velora_torch.bench.speed.variants import Part, SpeedVariant, Timed
from velora_torch.bench.speed.workload import Workload, build
from velora_torch.bench.surroundings import surroundings
from velora_torch.report.quantities import format_seconds

Say = Callable[[str], None]
Prepare = Callable[[Timed, Workload], Prepared]
WARMUPS = 2
"""Rounds before those that count: `torch.compile` compiles in the first, and may in the second."""


@dataclass
class Outcome:
    """What became of a case."""

    rows: list[SpeedRow] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Why, by variant."""


def prepared(variant: Timed, workload: Workload) -> Prepared:
    """Prepare a variant of a model or a layer, or a part of a layer's step."""
    if isinstance(variant, Part):
        return prepare_part(variant, workload)
    return prepare(variant, workload)


def run_case(
    case: Case,
    variants: Sequence[Timed],
    rounds: int,
    say: Say,
    command: str = "",
    clock: Clock = time.perf_counter,
    prepare: Prepare = prepared,
) -> Outcome:
    """Time the variants of a case in turn.

    A variant that can't be prepared, whose steps give what is not finite, or that is compiled
    again while it is timed, has no row; the others have theirs, unless it is the first, which all
    are compared with.

    Args:
        case: what to time.
        variants: the first one is the base of all ratios.
        rounds: timed steps of each.
        say: shows a line.
        command: what the user has typed, for the record.
        clock: seconds since whenever.
        prepare: makes the step of a variant.
    """
    import torch

    outcome, ready = Outcome(), dict[str, Prepared]()
    compiled = [v.name for v in variants if isinstance(v, SpeedVariant) and v.compiled]
    if compiled:
        torch.compiler.reset()  # a graph of a former case would make these recompilations
    around = surroundings()
    start = clock()
    workload = build(case)
    for variant in variants:
        say(f"{case.name}: preparing {variant.name}")
        try:
            one = prepare(variant, workload)
            for _ in range(WARMUPS):  # here, since it may fail, for want of a compiler say
                one.step()
            ready[variant.name] = one
        except FAILURES as error:
            outcome.failed[variant.name] = first_line(error)
        if variant is variants[0] and outcome.failed:
            return outcome
    turns = rounds * len(ready)
    say(
        f"{case.name}: {len(ready)} variants are ready after {format_seconds(clock() - start)}; "
        f"timing {turns} steps"
    )
    again: set[str] = set()
    steps = [
        _watched(name, one.step, again) if name in compiled else one.step
        for name, one in ready.items()
    ]
    taken = interleave(steps, rounds, 1, clock)
    seconds = dict(zip(ready, taken, strict=True))
    for name, one in ready.items():
        if not bool(torch.isfinite(one.result()).all()):
            outcome.failed[name] = "its numbers are not finite"
        elif name in again:
            outcome.failed[name] = "it was compiled again in a timed round"
    seconds = {name: own for name, own in seconds.items() if name not in outcome.failed}
    flops = {name: one.flops for name, one in ready.items()}
    if variants[0].name in seconds:
        saved = {name: one.saved for name, one in ready.items()}
        outcome.rows = make_rows(case, seconds, flops, around, command, saved)
    del ready, steps, workload
    gc.collect()
    return outcome


def _watched(name: str, step: Step, again: set[str]) -> Step:
    """The step, which adds its name where it compiles."""

    def watched() -> None:
        graphs = graphs_made()
        step()
        if graphs_made() != graphs:
            again.add(name)

    return watched


def graphs_made() -> int:
    """How many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
