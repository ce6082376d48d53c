"""Products of matrices on this CPU: float32, bfloat16 as PyTorch has it, and through float32.

    python benchmarks/half_products.py

Square matrices, forward and both gradients of a product, in turn; one row for each width and way
in benchmarks/results/half_products.jsonl.
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
WIDTHS, ROUNDS = (512, 1024), 3


def step(width: int, dtype: torch.dtype, types: tuple[torch.dtype, ...]) -> None:
    a, b = (torch.ones(width, width, dtype=dtype, requires_grad=True) for _ in range(2))
    with float32_products(types):
        (a @ b).backward(torch.ones(width, width, dtype=dtype))


def measure(width: int) -> list[dict[str, object]]:
    ways = {
        "float32": partial(step, width, torch.float32, ()),
        "bfloat16": partial(step, width, torch.bfloat16, ()),
        "bfloat16 through float32": partial(step, width, torch.bfloat16, (torch.bfloat16,)),
    }
    taken = interleave(list(ways.values()), ROUNDS)
    return [
        {
            "way": way,
            "width": width,
            "seconds": seconds,
            "gflops": 6 * width**3 / statistics.median(seconds) / 1e9,
        }
        for way, seconds in zip(ways, taken, strict=True)
    ]


def main() -> None:
    around = {"command": shlex.join(["python", *sys.argv]), **surroundings()}
    with ROWS.open("a", encoding="utf-8") as rows:
        for width in WIDTHS:
            for row in measure(width):
                rows.write(json.dumps(row | around) + "\n")
                print(f"{width:5} {row['way']:26} {row['gflops']:8.1f} GFLOP/s")


if __name__ == "__main__":
    main()
