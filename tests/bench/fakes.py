"""A bench whose cells need no training, and what pretends to run and to time them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from velora_torch.bench.grid import Bench, Cell, Row, Scale, Variant

VARIANTS = (
    Variant("full", "Full"),
    Variant("full+velora", "Full + VeLoRA", "full"),
    Variant("probe", "Linear probing"),
)
TASKS = ("a", "b")
AT_WORK = b"at work\n"


def recipe(task: str, variant: str, seed: int) -> dict[str, Any]:
    """A valid recipe that nobody runs."""
    velora = {"sub_token_size": 4} if variant.endswith("velora") else None
    return {
        "velora": velora,
        "data": {"train": task},
        "train": {"seed": seed, "steps": 3},
    }


def make_bench(recipe_of: Callable[[str, str, int], dict[str, Any]] = recipe) -> Bench:
    scales = {"local": Scale(TASKS, recipe_of, timed="b")}
    return Bench("fake", "A bench", VARIANTS, scales, notes="Scores are made up.")


def row(cell: Cell, score: float = 0.5, **given: Any) -> Row:
    """What a run of a cell could have measured."""
    fields: dict[str, Any] = {
        "memory": {"total": 100, "saved_activations": 40},
        "trainable_parameters": 10,
        "seconds": 2.0,
        "date": "2026-01-01T00:00:00+00:00",
        "command": "velora bench fake",
        "recipe": dict(cell.recipe),
    }
    fields |= given
    return Row(*cell.place, cell.fingerprint, "accuracy", score, **fields)


class Runs:
    """Runs cells in no time, and remembers which; some fail, one is interrupted."""

    def __init__(self, fail: tuple[str, ...] = (), interrupt: str = "", **given: Any) -> None:
        self.fail, self.interrupt, self.given = fail, interrupt, given
        self.ran: list[str] = []

    def __call__(self, cell: Cell) -> Row:
        self.ran.append(str(cell))
        if str(cell) == self.interrupt:
            raise KeyboardInterrupt
        if str(cell) in self.fail:
            raise RuntimeError(f"no luck with {cell}\nand a second line")
        return row(cell, **self.given)


def run_elsewhere(cell: Cell) -> Row:
    """For worker processes: one cell fails, one kills its process."""
    import torch

    if str(cell) == "a, full+velora, seed 0":
        raise ValueError("refused")
    if str(cell) == "a, probe, seed 0":
        os.kill(os.getpid(), signal.SIGKILL)
    return row(cell, machine={"cores": torch.get_num_threads(), "pid": os.getpid()})


def sleep(cell: Cell) -> Row:
    """A cell that says that it runs, and takes longer than the test."""
    os.write(1, AT_WORK)
    time.sleep(60)
    return row(cell)
