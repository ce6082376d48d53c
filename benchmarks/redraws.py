"""Redraws in a longer training of a tiny model: how often, and whether in orthogonal turns.

    python benchmarks/redraws.py [--part 1/2]     # 3 to 4 minutes for each run on one slow core
    python benchmarks/redraws.py --table

The model of tiny_lm.py (0.4 million parameters in its blocks) reads 2 MB of Debian's manuals as
bytes, 1000 steps of 16 x 128, AdamW, cosine with 10% warm-up, clipping at 1, every linear layer of
the blocks compressed with M = 8. One row for each run in results/redraws.jsonl; finished runs are
skipped. Each method's rate is the best of half, whole and double with the first seed, which stand
in the rows too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

import tiny_lm
import velora_torch as velora
from velora_torch.bench.statistics import estimate
from velora_torch.bench.table import format_change, format_estimate
from velora_torch.bench.writing import markdown_grid
from velora_torch.report.environment import machine_info, version_info
from velora_torch.training.packaged.manuals import load_manuals

ROWS = Path(__file__).parent / "results" / "redraws.jsonl"
STEPS, BATCH, LENGTH = 1000, 16, tiny_lm.LENGTH
HELD_OUT = 300_000  # bytes
EVALUATED = 256  # sequences
SEEDS = (0, 1, 2)
REST = 1e-2
"""The rate of embeddings, norms and head."""


@dataclasses.dataclass(frozen=True)
class Method:
    label: str
    rate: float
    """Of the blocks' linear layers."""
    velora: dict[str, Any] | None = None


def _all(init: str, every: int) -> dict[str, Any]:
    return {"init": init, "refresh_every": every, "sub_token_size": 8}


METHODS = {
    "full": Method("Full", 2e-3),
    "signs-83": Method("signs, 12 draws", 4e-3, _all("rademacher", 83)),
    "hadamard-83": Method("orthogonal signs, 12 draws", 4e-3, _all("hadamard", 83)),
    "hadamard-42": Method("orthogonal signs, 24 draws", 4e-3, _all("hadamard", 42)),
}
SWEPT = ("full", "signs-83", "hadamard-83")


@dataclasses.dataclass(frozen=True)
class Cell:
    method: str
    seed: int
    rate: float


def cells() -> list[Cell]:
    chosen = [Cell(name, seed, of.rate) for seed in SEEDS for name, of in METHODS.items()]
    rates = [
        Cell(name, SEEDS[0], factor * METHODS[name].rate) for name in SWEPT for factor in (0.5, 2)
    ]
    return chosen + rates


@functools.cache
def text() -> Tensor:
    """All manuals, shuffled, as bytes."""
    documents = list(load_manuals("debian-docs"))
    random.Random(0).shuffle(documents)
    return torch.frombuffer(bytearray("\n\n".join(documents).encode()), dtype=torch.uint8)


def batches(seed: int) -> Iterator[Tensor]:
    """Random pieces of all but the last bytes, (batch, length), without end."""
    generator = torch.Generator().manual_seed(seed)
    last = len(text()) - HELD_OUT - LENGTH
    while True:
        starts = torch.randint(0, last, (BATCH,), generator=generator).tolist()
        yield torch.stack([text()[start : start + LENGTH] for start in starts]).long()


@torch.no_grad()
def held_out_loss(lm: LlamaForCausalLM) -> float:
    """Nats a byte."""
    pieces = text()[-HELD_OUT:].unfold(0, LENGTH, LENGTH)
    spread = pieces[:: len(pieces) // EVALUATED][:EVALUATED].long()
    losses = [lm.eval()(input_ids=ids, labels=ids).loss for ids in spread.split(64)]
    return float(torch.stack(losses).double().mean())


def train(cell: Cell) -> float:
    """The held-out loss at the end."""
    lm = tiny_lm.model(cell.seed).train()
    rest = [p for name, p in lm.named_parameters() if "_proj" not in name]
    settings = METHODS[cell.method].velora
    if settings is not None:
        fixed = {"vectors": "per_group", "track_delta": False, "seed": cell.seed}
        velora.compress(lm, velora.VeloraConfig(**fixed, **settings))
    known = {id(p) for p in rest}
    linear = [p for p in lm.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": rest, "lr": REST}, {"params": linear, "lr": cell.rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    stream = batches(1000 + cell.seed)
    for _ in range(STEPS):
        ids = next(stream)
        lm(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_([*rest, *linear], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return held_out_loss(lm)


def rows() -> dict[Cell, dict[str, Any]]:
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    found = map(json.loads, lines)
    return {Cell(row["method"], row["seed"], row["rate"]): row for row in found}


def table() -> str:
    """Loss, how much more than full training's, paired by seed, and the rates of the first seed."""
    losses = {cell: row["loss"] for cell, row in rows().items()}
    body = []
    for name, method in METHODS.items():
        own, base = _by_seed(losses, name), _by_seed(losses, "full")
        gaps = [own[seed] / base[seed] - 1 for seed in own.keys() & base.keys()]
        tried = [(cell.rate, loss) for cell, loss in losses.items() if cell.method == name]
        first = {rate: losses.get(Cell(name, SEEDS[0], rate)) for rate, _ in sorted(tried)}
        cells = [
            format_estimate(estimate(list(own.values())), 1.0, 3),
            "" if name == "full" else format_change(estimate(gaps)),
            ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in first.items()),
        ]
        body.append([method.label, *cells])
    header = ["method", "nats a byte", "% against full", "by rate, first seed"]
    return markdown_grid(header, body)


def _by_seed(losses: dict[Cell, float], name: str) -> dict[int, float]:
    """Losses of a method at its own rate."""
    at = {seed: losses.get(Cell(name, seed, METHODS[name].rate)) for seed in SEEDS}
    return {seed: loss for seed, loss in at.items() if loss is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="1/1", help="such as 1/2: every second run")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    index, parts = (int(n) for n in arguments.part.split("/"))
    todo = [cell for cell in cells() if cell not in rows()][index - 1 :: parts]
    for cell in todo:
        began = time.perf_counter()
        row = {
            "benchmark": "redraws",
            **dataclasses.asdict(cell),
            "velora": METHODS[cell.method].velora,
            "loss": train(cell),
            "seconds": time.perf_counter() - began,
            "command": "python benchmarks/redraws.py",
            "machine": dataclasses.asdict(machine_info()),
            "versions": version_info(),
        }
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(cell, f"{row['loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
