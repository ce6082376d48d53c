"""Which compression serves LoRA best: group size, choice of v, redraw, scale; several seeds.

    python benchmarks/lora_defaults.py [--part 1/2]    (part: share the work between processes)

LoRA of rank 16 on query and value of the MiniLM encoder, trained on the fifty kinds of TREC
questions and on rated sentences, 1600 examples, 3 epochs. One row for each variant, task and seed
in benchmarks/results/lora_defaults.jsonl; finished rows are skipped. --table prints the means.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from velora_torch.training.recipe import Recipe
from velora_torch.training.run import Options, run

ROWS = Path(__file__).parent / "results" / "lora_defaults.jsonl"
TASKS = {"trec-50": "text-classification", "vader": "text-regression"}
SEEDS = (0, 1, 2)
RATE = 1e-3

VARIANTS: dict[str, dict | None] = {
    "lora": None,
    "average, M=16": {"sub_token_size": 16},
    "average, M=4": {"sub_token_size": 4},
    "average, M=64": {"sub_token_size": 64},
    "average per group, M=16": {"sub_token_size": 16, "vectors": "per_group"},
    "running average, M=16": {"sub_token_size": 16, "init": "running_average"},
    "random, M=16": {"sub_token_size": 16, "init": "random"},
    "random per group, M=16": {"sub_token_size": 16, "init": "random", "vectors": "per_group"},
    "random per group, M=4": {"sub_token_size": 4, "init": "random", "vectors": "per_group"},
    "random per group, redrawn every 10, M=16": {
        "sub_token_size": 16,
        "init": "random",
        "vectors": "per_group",
        "refresh_every": 10,
    },
    "svd per group, M=16": {"sub_token_size": 16, "init": "svd", "vectors": "per_group"},
    "average, M=16, scale 0.1": {"sub_token_size": 16, "scale": 0.1},
}
RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates of the two variants that all others are judged by."""


def cells() -> list[tuple[str, str, int, float]]:
    """(variant, task, seed, learning rate), seed by seed."""
    found = []
    for seed in SEEDS:
        for task in TASKS:
            for name in VARIANTS:
                rates = RATES if name in ("lora", "average, M=16") else (RATE,)
                found += [(name, task, seed, rate) for rate in rates]
    return found


def recipe(name: str, task: str, seed: int, rate: float, output: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": "minilm-l6",
            "task": TASKS[task],
            "method": "lora",
            "dtype": "float32",
            "velora": VARIANTS[name],
            "lora": {"r": 16, "alpha": 16.0, "dropout": 0.0, "targets": ["query", "value"]},
            "data": {"train": task, "max_length": 64, "max_train": 1600, "too_long": "truncate"},
            "train": {
                "output": output,
                "epochs": 3.0,
                "batch_size": 16,
                "learning_rate": rate,
                "head_learning_rate": 3e-3,
                "warmup": 0.1,
                "autocast": True,
                "tensorboard": False,
                "save_final": False,
                "group_by_length": True,
                "seed": seed,
            },
            "evaluate": {"before": False, "batch_size": 64},
        }
    )


def measure(cell: tuple[str, str, int, float]) -> dict:
    name, task, seed, rate = cell
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        options = Options(overwrite=True, report=False)
        results = run(recipe(*cell, output), options, lambda line: None)
    assert results.after is not None
    assert results.memory is not None
    return {
        "benchmark": "lora_defaults",
        "variant": name,
        "task": task,
        "seed": seed,
        "learning_rate": rate,
        "metric": results.after.metric,
        "score": results.after.score,
        "train_loss": results.history[-1].loss,
        "saved_activations": results.memory.saved_activations,
        "seconds": time.perf_counter() - start,
        "command": "python benchmarks/lora_defaults.py",
        "machine": vars(results.run.machine),
        "versions": results.run.versions,
    }


def done() -> list[dict]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table() -> str:
    """Means over seeds; the difference to plain LoRA at the same rate, with its standard error."""
    by: dict[tuple, dict[int, float]] = defaultdict(dict)
    for row in done():
        by[row["variant"], row["learning_rate"], row["task"]][row["seed"]] = row["score"]
    lines = ["| variant | rate | " + " | ".join(TASKS) + " |", "| --- " * (2 + len(TASKS)) + "|"]
    for name in VARIANTS:
        for rate in RATES:
            cells_ = [_cell(by, name, rate, task) for task in TASKS]
            if any(cell != "-" for cell in cells_):
                lines.append(f"| {name} | {rate:g} | " + " | ".join(cells_) + " |")
    return "\n".join(lines)


def _cell(by: dict, name: str, rate: float, task: str) -> str:
    scores, plain = by.get((name, rate, task)), by.get(("lora", rate, task), {})
    if not scores:
        return "-"
    mean = 100 * statistics.mean(scores.values())
    shared = [100 * (scores[s] - plain[s]) for s in scores if s in plain]
    if name == "lora" or len(shared) < 2:
        return f"{mean:.1f}"
    error = statistics.stdev(shared) / len(shared) ** 0.5
    return f"{mean:.1f} ({statistics.mean(shared):+.1f} ± {error:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="1/1", help="such as 1/2: every second cell")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    index, parts = (int(n) for n in arguments.part.split("/"))
    known = {(r["variant"], r["task"], r["seed"], r["learning_rate"]) for r in done()}
    todo = [cell for cell in cells() if cell not in known][index - 1 :: parts]
    for number, cell in enumerate(todo, 1):
        row = measure(cell)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(todo)}", *cell, f"{row['score']:.4f}", f"{row['seconds']:.0f} s")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
