"""Products of matrices on this CPU: float32, bfloat16 as PyTorch has it, and through float32.

    python benchmarks/half_products.py

Square matrices and causal attention (heads of 64, 2,048 tokens in all), forward and all gradients,
in turn; one row for each size and way in benchmarks/results/half_products.jsonl.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from velora_torch.bench.interleave import interleave
from velora_torch.bench.surroundings import surroundings
from velora_torch.half_products import float32_products

ROWS = Path(__file__).parent / "results" / "half_products.jsonl"
WIDTHS, LENGTHS, ROUNDS = (512, 1024), (128, 512), 3
HEADS, HEAD, TOKENS = 6, 64, 2048

Step = Callable[[int, torch.dtype, tuple[torch.dtype, ...]], None]


def product(width: int, dtype: torch.dtype, types: tuple[torch.dtype, ...]) -> None:
    a, b = (torch.ones(width, width, dtype=dtype, requires_grad=True) for _ in range(2))
    with float32_products(types):
        (a @ b).backward(torch.ones(width, width, dtype=dtype))


def attention(length: int, dtype: torch.dtype, types: tuple[torch.dtype, ...]) -> None:
    shape = (TOKENS // length, HEADS, length, HEAD)
    q, k, v = (torch.ones(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    with float32_products(types):
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        y.backward(torch.ones(shape, dtype=dtype))


def measure(step: Step, size: int) -> dict[str, list[float]]:
    """Seconds of each round, by way."""
    ways = {
        "float32": partial(step, size, torch.float32, ()),
        "bfloat16": partial(step, size, torch.bfloat16, ()),
        "bfloat16 through float32": partial(step, size, torch.bfloat16, (torch.bfloat16,)),
    }
    return dict(zip(ways, interleave(list(ways.values()), ROUNDS), strict=True))


def rows() -> Iterator[dict[str, Any]]:
    for width in WIDTHS:
        for way, seconds in measure(product, width).items():
            gflops = 6 * width**3 / statistics.median(seconds) / 1e9
            yield {"way": way, "width": width, "seconds": seconds, "gflops": gflops}
    for length in LENGTHS:
        for way, seconds in measure(attention, length).items():
            yield {"way": way, "attention": length, "seconds": seconds}


def main() -> None:
    around = {"command": shlex.join(["python", *sys.argv]), **surroundings()}
    with ROWS.open("a", encoding="utf-8") as file:
        for row in rows():
            file.write(json.dumps(row | around) + "\n")
            size = row["width"] if "width" in row else f"attention {row['attention']}"
            speed = f"{row['gflops']:8.1f} GFLOP/s" if "gflops" in row else ""
            milliseconds = 1000 * statistics.median(row["seconds"])
            print(f"{size:13} {row['way']:26} {milliseconds:8.1f} ms {speed}")


if __name__ == "__main__":
    main()
