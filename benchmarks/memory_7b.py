"""Where the memory of LLaMA-7B goes, and what each saving changes: docs/results/memory.md.

4 x 1024 tokens, bfloat16, AdamW; simulated on fake tensors, so no GPU is needed.

    python benchmarks/memory_7b.py              # about one minute; rows, page and figure
    python benchmarks/memory_7b.py --page       # page and figure from the rows that are there
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import torch

from simulated_rows import GIB, Row, Tables, as_row, gib, markdown, read_rows, update
from tiny_lm import write_rows
from velora_torch import VeloraConfig
from velora_torch.memory.simulator.presets import preset
from velora_torch.memory.simulator.simulate import simulate
from velora_torch.recomputation import recompute

HERE = Path(__file__).parent
ROWS = HERE / "results" / "memory_7b.jsonl"
PAGE = HERE.parent / "docs" / "results" / "memory.md"
FIGURE = HERE.parent / "docs" / "figures" / "memory_7b.py"
MODEL, BATCH, SEQ = "llama-7b", 4, 1024
GROUPS = 32
SAVED_GOAL, PEAK_GOAL = 12.5 * GIB, 17.5 * GIB

VALUE_DOWN = VeloraConfig(targets=["v_proj", "down_proj"], num_groups=GROUPS, track_delta=False)
ALL = VeloraConfig(targets="all-linear", num_groups=GROUPS, track_delta=False)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, fused AdamW": {"optimizer": "adamw_fused"},
    "VeLoRA on value and down": {"velora": VALUE_DOWN},
    "VeLoRA on all block linears": {"velora": ALL},
    "… + norms recomputed": {"velora": ALL, "norms": True},
    "… + gated activation recomputed": {"velora": ALL, "recompute": True},
    "… + chunked loss": {"velora": ALL, "recompute": True, "chunked_loss": True},
    "all recomputed, fused AdamW": {
        "recompute": True,
        "chunked_loss": True,
        "optimizer": "adamw_fused",
    },
    "GC": {"checkpoint_every": 1},
    "GC, fused AdamW": {"checkpoint_every": 1, "optimizer": "adamw_fused"},
    "GC + VeLoRA on all block linears": {"checkpoint_every": 1, "velora": ALL},
    "… + recompute, chunked loss": {
        "checkpoint_every": 1,
        "velora": ALL,
        "recompute": True,
        "chunked_loss": True,
    },
    "LoRA r=16, adapters in float32": {"method": "lora"},
    "LoRA r=16, adapters in bfloat16": {"method": "lora", "adapters_in_float32": False},
    "LoRA r=16 + GC": {"method": "lora", "checkpoint_every": 1},
}


def with_norms_recomputed() -> torch.nn.Module:
    """The model without data, whose norms alone are recomputed (a setup does both or neither)."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(preset(MODEL), dtype=torch.bfloat16)
    return recompute(model, norms=True, activations=False, loss=False)


def measure() -> list[Row]:
    """A row for each case."""
    rows = []
    for name, case in CASES.items():
        settings = dict(case)
        model: Any = with_norms_recomputed() if settings.pop("norms", False) else MODEL
        simulation = simulate(model, batch=BATCH, seq=SEQ, **settings)
        row = {"benchmark": "memory_7b", "name": name, **as_row(simulation)}
        row["setup_text"] = str(simulation.setup)
        rows.append(row)
        print(f"{name:36} {gib(row['peak_bytes'])} GiB, saved {gib(row['saved'])}", flush=True)
    return rows


def tables(rows: list[Row]) -> Tables:
    """The tables of the page."""
    plain = rows[0]["flops"]["total"]
    kept = markdown(
        ("LLaMA-7B, 4 × 1024", "saved", "gradients", "states", "weights", "peak", "step cost"),
        [
            (
                row["name"],
                gib(row["saved"]),
                gib(row["gradients"]),
                gib(row["optimizer_state"]),
                gib(row["weights"]),
                f"**{gib(row['peak_bytes'])}**",
                f"{row['flops']['total'] / plain:.2f}",
            )
            for row in rows
        ],
    )
    peaks = markdown(
        ("", "peak", "at", "weights", "gradients", "states", "saved", "logits", "temporary"),
        [
            (
                row["name"],
                f"**{gib(row['peak_bytes'])}**",
                row["peak_at"].replace("base_model.model.", "").replace("model.layers, ", ""),
                *(gib(number) for number in row["peak"].values()),
            )
            for row in rows
        ],
    )
    return {"kept": kept, "peaks": peaks, "goals": goals(rows)}


def goals(rows: list[Row]) -> str:
    """What was to be reached, and what was."""
    by_name = {row["name"]: row for row in rows}
    saved = ("… + gated activation recomputed", "… + chunked loss")
    peaks = ("GC + VeLoRA on all block linears", "… + recompute, chunked loss")
    asked = [(n, "saved", SAVED_GOAL) for n in saved] + [
        (n, "peak_bytes", PEAK_GOAL) for n in peaks
    ]
    lines = [
        (
            f"{by_name[name]['setup_text']}",
            f"{'saved' if key == 'saved' else 'peak'} at most {gib(goal, 1)}",
            gib(by_name[name][key]),
            "yes" if by_name[name][key] <= goal else "**no**",
            gib(by_name["plain"][key]),
        )
        for name, key, goal in asked
    ]
    return markdown(("setup", "goal, GiB", "GiB", "reached", "plain"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="no simulation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        write_rows(ROWS, measure(), "python benchmarks/memory_7b.py")
    update(PAGE, tables(read_rows(ROWS)))
    runpy.run_path(str(FIGURE))["draw"](FIGURE.with_suffix(".svg"), ROWS)


if __name__ == "__main__":
    main()
