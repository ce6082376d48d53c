"""Trains a small model for a long time and looks whether memory grows.

A process takes training steps of the run behind `velora train` (redrawn vectors, accumulation,
clipping, checkpoints, log lines, safety checks) and notes its resident memory and the bytes of all
tensors that Python knows, every few seconds. The first tenth of the time counts as warming up.
Of the rest a line is fitted: its slope, in MiB per hour, goes into a row of results/soak.jsonl.
Several processes, as torchrun starts them, also compare hashes of all weights, states of the
optimizer and vectors now and then: whatever differs in one bit on another rank counts as drift.

    python benchmarks/soak.py                 # two hours
    python benchmarks/soak.py --minutes 12    # shorter; the row says how long it ran
    torchrun --nproc-per-node 2 benchmarks/soak.py    # the same with two ranks
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from kills import prepare
from velora_torch import ranks
from velora_torch.memory.count import unique_bytes
from velora_torch.report.environment import machine_info, version_info
from velora_torch.training import models, processes
from velora_torch.training.assemble import place, prepare_data
from velora_torch.training.recipe import load_recipe
from velora_torch.training.trainer import Record, build_trainer

ROWS = Path(__file__).parent / "results" / "soak.jsonl"
MIB = 2**20
EVERY = 5.0
"""Seconds between two looks."""
COMPARE = 200
"""Steps between two comparisons of the ranks."""


class Looks(TrainerCallback):
    """Notes memory while a trainer works, and ends it in time."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._start, self._last = seconds, time.monotonic(), 0.0
        self.points: list[tuple[float, int, int]] = []
        """Seconds, resident bytes, bytes of tensors."""
        self.comparisons = 0
        self.drifted: list[str] = []
        """Names of what differed in a comparison."""

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Look, now and then."""
        now = time.monotonic() - self._start
        if now - self._last >= EVERY:
            self._last = now
            self.points.append((now, resident(), tensor_bytes()))
        if state.global_step % COMPARE == 0 and processes.count() > 1:
            self.compare(rest["model"], rest["optimizer"])
        control.should_training_stop = processes.any_of(now >= self._seconds)

    def compare(self, model: Any, optimizer: Any) -> None:
        """See whether the ranks are equal to the last bit; every rank must call it."""
        parts = dict(model.named_parameters()) | dict(model.named_buffers())  # vectors too
        for index, state in enumerate(optimizer.state_dict()["state"].values()):
            held = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            parts |= {f"optimizer/{index}/{key}": value for key, value in held.items()}
        self.drifted += ranks.differing(
            {name: ranks.fingerprint(part, None) for name, part in parts.items()}
        )
        self.comparisons += 1


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    found = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return unique_bytes(found)


def slope(points: list[tuple[float, int]]) -> float:
    """MiB per hour of a fitted line."""
    line = statistics.linear_regression([t for t, _ in points], [size for _, size in points])
    return line.slope * 3600 / MIB


def soak(minutes: float, folder: Path) -> dict[str, Any]:
    """Train for some minutes; what was seen."""
    if processes.is_first():
        prepare(folder, "soak", 10**6, shards=False)
    processes.wait()
    recipe = load_recipe(
        folder / "soak.yaml",
        ["train.save_every=500", "train.log_every=1000", "velora.init=running_average"],
    )
    models.quiet()
    with processes.first_alone():
        tokenizer, data = prepare_data(recipe, print)
    model = place(models.load_model(recipe, print, data))
    looks, record = Looks(minutes * 60), Record()
    output = Path(recipe.train.output)
    trainer = build_trainer(recipe, model, tokenizer, data, output, record, print)
    trainer.add_callback(looks)
    trainer.train()
    points = looks.points[len(looks.points) // 10 :]
    half = len(points) // 2
    rss, tensors = [(t, r) for t, r, _ in points], [(t, b) for t, _, b in points]
    return {
        "benchmark": "soak",
        "minutes": round(points[-1][0] / 60, 2),
        "warm_up_minutes": round(points[0][0] / 60, 2),
        "ranks": processes.count(),
        "comparisons": looks.comparisons,
        "drifted": sorted(set(looks.drifted)),
        "steps": trainer.state.global_step,
        "looks": len(points),
        "rss_mib_per_hour": slope(rss),
        "rss_mib_per_hour_second_half": slope(rss[half:]),
        "rss_mib_first": rss[0][1] / MIB,
        "rss_mib_last": rss[-1][1] / MIB,
        "rss_mib_max": max(size for _, size in rss) / MIB,
        "tensors_mib_per_hour": slope(tensors),
        "tensor_bytes_first": tensors[0][1],
        "tensor_bytes_last": tensors[-1][1],
        "tensor_bytes_max": max(size for _, size in tensors),
    }


def main() -> None:
    """Train, and add a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    given = parser.parse_args()
    with processes.joined(), tempfile.TemporaryDirectory() as own:
        shared = [own]
        if processes.count() > 1:
            dist.broadcast_object_list(shared)
        os.environ["VELORA_CACHE"] = shared[0]  # trained vocabularies
        row = {**soak(given.minutes, Path(shared[0])), "asked_minutes": given.minutes}
        processes.wait()
    if not processes.is_first():
        return
    start = ["python"]
    if processes.count() > 1:
        start = ["torchrun", "--nproc-per-node", str(processes.count())]
    row |= {
        "command": shlex.join([*start, "benchmarks/soak.py", *sys.argv[1:]]),
        "machine": vars(machine_info()),
        "versions": version_info(),
    }
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
