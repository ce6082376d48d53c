"""What Adam's eps changes between the dense gradient and the factor: docs/results/eps.md.

On the dense gradient, eps is compared with sqrt(s) |v|; on the factor with sqrt(s). Here a small
language model is trained for 200 steps in float64 both ways, from the same weights, on the same
batches, with the same vectors, for several eps.

    python benchmarks/eps_effect.py             # about 6 minutes on one core
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import tiny_lm
import velora_torch as velora
from tiny_lm import LlamaForCausalLM

HERE = Path(__file__).parent
WARM_UP_STEPS, WARM_UP_RATE = 300, 2e-3
SUB_TOKEN_SIZE, RATE, SEED = 8, 5e-4, 0
EXACT = 1e-30
QUANTILES = (0.01, 0.5, 0.99)


def run(
    start: LlamaForCausalLM, gradient: Literal["factored", "dense"], eps: float, steps: int
) -> tuple[Tensor, list[float], float]:
    """Weight change, quantiles of sqrt(second moment) at the end, and the held-out loss."""
    lm = copy.deepcopy(start)
    tiny_lm.freeze_all_but_linear_layers(lm)
    velora.compress(
        lm,
        velora.VeloraConfig(
            sub_token_size=SUB_TOKEN_SIZE,
            init="random",
            vectors="per_group",
            seed=SEED,
            gradient=gradient,
        ),
    )
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=eps, weight_decay=0.0)
    tiny_lm.train(lm, optimizer, 1000 + SEED, steps)
    unbiased = 1 - 0.999**steps
    sizes = torch.cat(
        [(optimizer.state[p]["exp_avg_sq"] / unbiased).sqrt().flatten() for p in trained]
    )
    size_of = [
        float(torch.quantile(sizes[:: max(1, sizes.numel() // 100_000)], q)) for q in QUANTILES
    ]
    velora.restore(lm)
    change = tiny_lm.block_weights(lm) - tiny_lm.block_weights(start)
    return change, size_of, tiny_lm.held_out_loss(lm)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())


def measure(steps: int) -> list[dict[str, Any]]:
    start = tiny_lm.model(SEED)
    warm = torch.optim.AdamW(start.parameters(), lr=WARM_UP_RATE)
    tiny_lm.train(start, warm, SEED, WARM_UP_STEPS)
    start = start.double()
    remedy = math.sqrt(SUB_TOKEN_SIZE)
    vanishing, _, _ = run(start, "dense", EXACT, steps)
    rows = []
    for eps in (EXACT, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4):
        dense, dense_sizes, dense_loss = run(start, "dense", eps, steps)
        factored, sizes, loss = run(start, "factored", eps, steps)
        scaled, _, _ = run(start, "factored", eps * remedy, steps)
        row = {
            "benchmark": "eps_effect",
            "eps": eps,
            "steps": steps,
            "rate": RATE,
            "sub_token_size": SUB_TOKEN_SIZE,
            "factored_vs_dense": relative(factored, dense),
            "factored_eps_times_sqrt_m_vs_dense": relative(scaled, dense),
            "dense_vs_dense_without_eps": relative(dense, vanishing),
            "factored_vs_dense_without_eps": relative(factored, vanishing),
            "dense_loss": dense_loss,
            "factored_loss": loss,
            "quantiles": QUANTILES,
            "dense_root_second_moment": dense_sizes,
            "factored_root_second_moment": sizes,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "eps_effect.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.steps)
    tiny_lm.write_rows(
        options.out, rows, f"python benchmarks/eps_effect.py --steps {options.steps}"
    )


if __name__ == "__main__":
    main()
