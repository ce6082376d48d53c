"""What becomes of small updates in bfloat16 weights: docs/results/bf16.md.

A bfloat16 number has 8 significant bits: 1e-5 added to a weight of 0.05 is lost by rounding to
nearest. Here a small language model is trained for 300 steps at a learning rate of 1e-5, in
float32 and in pure bfloat16 with each way of folding coefficients, from the same weights on the
same batches.

    python benchmarks/bf16_updates.py           # about 10 minutes on one core
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch

import tiny_lm
import velora_torch as velora
from tiny_lm import LlamaForCausalLM

HERE = Path(__file__).parent
WARM_UP_STEPS, WARM_UP_RATE = 500, 2e-3
SUB_TOKEN_SIZE = 8

RUNS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "VeLoRA, nearest, every step": {"rounding": "nearest", "fold_every": 1},
    "VeLoRA, nearest, every 16": {"rounding": "nearest", "fold_every": 16},
    "VeLoRA, nearest, every 64": {"rounding": "nearest", "fold_every": 64},
    "VeLoRA, stochastic, every step": {"rounding": "stochastic", "fold_every": 1},
    "VeLoRA, stochastic, every 16": {"rounding": "stochastic", "fold_every": 16},
    "VeLoRA, stochastic, every 64": {"rounding": "stochastic", "fold_every": 64},
    "VeLoRA, nearest, once at the end": {"rounding": "nearest", "fold_every": None},
}


def warm_model(seed: int) -> LlamaForCausalLM:
    """A model with trained weights, each of them a bfloat16 number (stored in float32)."""
    lm = tiny_lm.model(seed)
    tiny_lm.train(lm, torch.optim.AdamW(lm.parameters(), lr=WARM_UP_RATE), seed, WARM_UP_STEPS)
    return lm.bfloat16().float()


def run(
    start: LlamaForCausalLM,
    dtype: torch.dtype,
    folding: dict[str, Any] | None,
    seed: int,
    steps: int,
    rate: float,
) -> LlamaForCausalLM:
    """Train a copy of ``start`` and return it as a plain model."""
    lm = copy.deepcopy(start).to(dtype)
    tiny_lm.freeze_all_but_linear_layers(lm)
    if folding is not None:
        config = velora.VeloraConfig(
            sub_token_size=SUB_TOKEN_SIZE, init="random", vectors="per_group", seed=seed, **folding
        )
        velora.compress(lm, config)
    trained = [p for p in lm.parameters() if p.requires_grad]
    tiny_lm.train(lm, torch.optim.AdamW(trained, lr=rate, weight_decay=0.0), 1000 + seed, steps)
    return velora.restore(lm)


def measure(seed: int, steps: int, rate: float) -> list[dict[str, Any]]:
    """One row per run; each bfloat16 run is compared with its own float32 run."""
    start = warm_model(seed)
    before = tiny_lm.held_out_loss(start)
    weights = tiny_lm.block_weights(start)
    rows = []
    exact: dict[bool, tuple[float, torch.Tensor]] = {}
    for compressed in (False, True):
        folding = {"fold_every": 1} if compressed else None
        lm = run(start, torch.float32, folding, seed, steps, rate)
        decrease = before - tiny_lm.held_out_loss(lm)
        change = tiny_lm.block_weights(lm) - weights
        exact[compressed] = (decrease, change)
        name = "VeLoRA" if compressed else "AdamW"
        rows.append(_row(name, "float32", seed, before, decrease, exact[compressed], change))
        print(rows[-1], flush=True)
    # What storing the float32 run's end in bfloat16 costs: the least that any run can lose.
    decrease = before - tiny_lm.held_out_loss(lm.bfloat16())
    change = tiny_lm.block_weights(lm) - weights
    name = "VeLoRA, float32, rounded at the end"
    rows.append(_row(name, "float32", seed, before, decrease, exact[True], change))
    for name, folding in RUNS.items():
        lm = run(start, torch.bfloat16, folding, seed, steps, rate)
        decrease = before - tiny_lm.held_out_loss(lm)
        change = tiny_lm.block_weights(lm) - weights
        reference = exact[folding is not None]
        rows.append(_row(name, "bfloat16", seed, before, decrease, reference, change))
        print(rows[-1], flush=True)
    return rows


def _row(
    name: str,
    dtype: str,
    seed: int,
    before: float,
    decrease: float,
    exact: tuple[float, torch.Tensor],
    change: torch.Tensor,
) -> dict[str, Any]:
    exact_decrease, exact_change = exact
    size = exact_change.norm()
    return {
        "benchmark": "bf16_updates",
        "run": name,
        "dtype": dtype,
        "seed": seed,
        "loss_before": before,
        "loss_decrease": decrease,
        "decrease_kept": decrease / exact_decrease,
        "change_error": float((change - exact_change).norm() / size),
        "change_projection": float(change @ exact_change / size**2),
        "weights_changed": float((change != 0).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bf16_updates.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.seeds):
        rows += measure(seed, options.steps, options.rate)
    command = (
        f"python benchmarks/bf16_updates.py --steps {options.steps} --rate {options.rate} "
        f"--seeds {options.seeds}"
    )
    for row in rows:
        row |= {"steps": options.steps, "rate": options.rate}
    tiny_lm.write_rows(options.out, rows, command)


if __name__ == "__main__":
    main()
