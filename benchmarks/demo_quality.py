"""What the demonstration learns, for several settings and seeds: docs/results/demo.md.

Each row is one whole `velora train recipes/demo.yaml` with overrides, so that what is compared is
what a reader can run. A row that is in the file already is not run again.

    python benchmarks/demo_quality.py sweep      # one seed, learning rates and settings
    python benchmarks/demo_quality.py final      # three seeds: plain and VeLoRA at their best rates
    python benchmarks/demo_quality.py table      # the page's tables, from the rows
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = HERE / "results" / "demo_quality.jsonl"
RECIPE = HERE.parent / "recipes" / "demo.yaml"
COMMON = ("compare=null", "evaluate.before=false", "train.tensorboard=false")

VARIANTS = {
    "plain": ("velora=null",),
    "plain, float32 weights and bf16 autocast": (
        "velora=null",
        "dtype=float32",
        "train.autocast=true",
    ),
    "VeLoRA, as the recipe": (),
}
SWEEP = [
    ("VeLoRA, as the recipe", 1e-4),
    ("VeLoRA, as the recipe", 3e-4),
    ("VeLoRA, as the recipe", 1e-3),
    ("plain", 3e-5),
    ("plain", 1e-4),
    ("plain", 3e-4),
    ("plain", 1e-3),
    ("plain, float32 weights and bf16 autocast", 1e-4),
]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["variant"], row["learning_rate"], row["seed"], row["steps"]


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def run(variant: str, rate: float, seed: int, steps: int) -> None:
    """One training run in a process of its own; its row is appended."""
    key = (variant, rate, seed, steps)
    if key in [key_of(row) for row in read_rows()]:
        print("have", *key)
        return
    overrides = [
        *COMMON,
        *VARIANTS[variant],
        f"train.learning_rate={rate}",
        f"train.steps={steps}",
        f"train.seed={seed}",
        *([] if variant.startswith("plain") else [f"velora.seed={seed}"]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-c",
            "import sys; from velora_torch.cli import main; sys.argv[0] = 'velora'; main()",
            "train",
            str(RECIPE),
            f"train.output={folder}/run",
            *overrides,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results = json.loads((Path(folder) / "run" / "results.json").read_text())
    row = {
        "benchmark": "demo_quality",
        "variant": variant,
        "learning_rate": rate,
        "seed": seed,
        "steps": steps,
        "accuracy": results["after"]["accuracy"],
        "loss": results["after"]["loss"],
        "examples": results["after"]["examples"],
        "command": f"velora train recipes/demo.yaml {' '.join(map(repr, overrides))}",
        "machine": results["run"]["machine"],
        "versions": results["run"]["versions"],
    }
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(*key, f"accuracy {row['accuracy']:.1%} loss {row['loss']:.4f}", flush=True)


def table() -> None:
    """Mean accuracy and loss over seeds, smallest and largest in brackets, best rate first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in read_rows():
        groups.setdefault((row["variant"], row["learning_rate"], row["steps"]), []).append(row)
    print("| trained with | learning rate | steps | seeds | accuracy | loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for (variant, rate, steps), rows in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1])):
        accuracy = [row["accuracy"] for row in rows]
        loss = statistics.mean(row["loss"] for row in rows)
        spread = f" ({min(accuracy):.1%} to {max(accuracy):.1%})" if len(rows) > 1 else ""
        mean = f"{statistics.mean(accuracy):.1%}{spread}"
        print(f"| {variant} | {rate:g} | {steps} | {len(rows)} | {mean} | {loss:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("sweep", "final", "table"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, help="final: VeLoRA's learning rate")
    parser.add_argument("--plain-rate", type=float, help="final: plain training's")
    arguments = parser.parse_args()
    if arguments.what == "sweep":
        for variant, rate in SWEEP:
            run(variant, rate, 0, arguments.steps)
    elif arguments.what == "final":
        for seed in range(3):
            run("VeLoRA, as the recipe", arguments.rate, seed, arguments.steps)
            run("plain", arguments.plain_rate, seed, arguments.steps)
    table()


if __name__ == "__main__":
    main()
