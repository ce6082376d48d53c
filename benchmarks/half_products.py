"""Products of matrices on this CPU: float32, bfloat16 as PyTorch has it, and through float32.

    python benchmarks/half_products.py

Square matrices, forward and both gradients of a product, in turn; one row for each way in
benchmarks/results/half_products.jsonl.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from velora_torch.bench.interleave import interleave
from velora_torch.bench.surroundings import surroundings
from velora_torch.half_products import float32_products

ROWS = Path(__file__).parent / "results" / "half_products.jsonl"
WIDTH, ROUNDS = 512, 5


def step(dtype: torch.dtype, types: tuple[torch.dtype, ...]) -> None:
    a, b = (torch.ones(WIDTH, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
    with float32_products(types):
        (a @ b).sum().backward()


def main() -> None:
    ways = {
        "float32": partial(step, torch.float32, ()),
        "bfloat16": partial(step, torch.bfloat16, ()),
        "bfloat16 through float32": partial(step, torch.bfloat16, (torch.bfloat16,)),
    }
    around = surroundings()
    taken = interleave(list(ways.values()), ROUNDS)
    with ROWS.open("a", encoding="utf-8") as rows:
        for way, seconds in zip(ways, taken, strict=True):
            median = statistics.median(seconds)
            row = {
                "way": way,
                "width": WIDTH,
                "seconds": seconds,
                "gflops": 6 * WIDTH**3 / median / 1e9,
                "command": shlex.join(["python", *sys.argv]),
                **around,
            }
            rows.write(json.dumps(row) + "\n")
            print(f"{way:26} {row['gflops']:8.1f} GFLOP/s")


if __name__ == "__main__":
    main()
