"""A training step of every variant, timed in turn on one task."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from velora_torch.bench.cell import recipe_of
from velora_torch.bench.grid import Cell
from velora_torch.bench.interleave import Clock, Step, interleave, spread
from velora_torch.bench.store import append_line, read_records
from velora_torch.bench.surroundings import surroundings
from velora_torch.training.precision import products_of

Say = Callable[[str], None]
ROUNDS = 21


@dataclass
class StepTime:
    """Seconds of a variant's training step; one line of times.jsonl."""

    bench: str
    scale: str
    task: str
    variant: str
    fingerprint: str
    session: str
    """Date of the start; only times of one session are compared with each other."""
    median: float
    low: float
    high: float
    rounds: int
    ratio: float
    """Of the medians, to the session's first variant."""
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str = ""


def time_variants(
    cells: Sequence[Cell],
    make_step: Callable[[Cell], Step],
    say: Say,
    command: str = "",
    rounds: int = ROUNDS,
    clock: Clock = time.perf_counter,
) -> list[StepTime]:
    """Time a step of each cell in turn, after a round to warm up; see :func:`interleave`.

    Args:
        cells: one cell for each variant, of one task.
        make_step: builds the function that takes a training step of a cell.
        say: shows a line.
        command: what the user has typed, for the record.
        rounds: timed steps of each variant.
        clock: seconds since whenever.
    """
    steps = []
    with products_of(*(recipe_of(cell, ".") for cell in cells)):
        for cell in cells:
            say(f"timing: preparing {cell.variant} on {cell.task}")
            steps.append(make_step(cell))
        taken = [spread(seconds) for seconds in interleave(steps, rounds, clock=clock)]
        around = surroundings()
    return [
        StepTime(
            cell.bench,
            cell.scale,
            cell.task,
            cell.variant,
            cell.fingerprint,
            median=seconds.median,
            low=seconds.low,
            high=seconds.high,
            rounds=rounds,
            ratio=seconds.median / taken[0].median,
            command=command,
            **around,
        )
        for cell, seconds in zip(cells, taken, strict=True)
    ]


def make_step(cell: Cell) -> Step:
    """A function that takes a training step of a cell, always on the same batch.

    Forward, backward, clipping, optimizer: what the trainer does.
    """
    import torch

    from velora_torch.training.assemble import assemble

    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(cell, folder)
        assembled = assemble(recipe, lambda line: None)
        optimizer = assembled.make_optimizer()
    model, batch = assembled.model.train(), assembled.make_batch()

    def step() -> None:
        loss = assembled.loss(batch)
        loss.backward()
        if recipe.train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if loss.is_cuda:
            torch.cuda.synchronize()

    return step


def write_times(path: Path, times: Sequence[StepTime]) -> None:
    """Append the times of a session to times.jsonl."""
    for one in times:
        append_line(path, dataclasses.asdict(one))


def read_times(path: Path) -> list[StepTime]:
    """The lines of times.jsonl, in their order.

    Raises:
        ValueError: a line is not a time.
    """
    return read_records(path, StepTime, "the time of a step")


def current(times: Sequence[StepTime], grid: Sequence[Cell]) -> list[StepTime]:
    """Those times whose recipe is today's, whichever seed it was."""
    known = {(cell.scale, cell.task, cell.variant, cell.fingerprint) for cell in grid}
    return [one for one in times if (one.scale, one.task, one.variant, one.fingerprint) in known]


class OfSession(Protocol):
    """A time, as far as its session goes."""

    session: str
    variant: str


TimeT = TypeVar("TimeT", bound=OfSession)


def newest_with(times: Sequence[TimeT], variants: Sequence[str]) -> dict[str, TimeT]:
    """The times of some variants in the newest session that has timed all of them; else {}."""
    sessions: dict[str, dict[str, TimeT]] = {}
    for one in times:
        sessions.setdefault(one.session, {})[one.variant] = one
    for session in sorted(sessions, reverse=True):
        if all(variant in sessions[session] for variant in variants):
            return {variant: sessions[session][variant] for variant in variants}
    return {}
