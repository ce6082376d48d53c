"""Which compression serves a method best: group size, choice of v, redraw, gradient, rate.

    python benchmarks/sweep_velora.py [STUDY ...] [--part 1/2] [--table]

A study takes one task and one variant of a bench, and trains it with other settings of VeLoRA (and
of the learning rate, where its name says so); everything else is the bench's, the test examples
included, over three seeds. One row for each run in benchmarks/results/sweep_velora.jsonl; finished
rows are skipped. --table prints the means and the differences to the method without VeLoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from velora_torch.bench.catalogue import BENCHES
from velora_torch.training.recipe import Recipe
from velora_torch.training.run import Options, run

ROWS = Path(__file__).parent / "results" / "sweep_velora.jsonl"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """What one line of a study changes in the recipe of its variant."""

    velora: dict[str, Any] | None
    """Settings of VeLoRA, or none of it."""
    rate: float = 1.0
    """The learning rate, as a multiple of the bench's."""


@dataclass(frozen=True)
class Study:
    bench: str
    task: str
    variant: str
    settings: dict[str, Setting]
    """By name; the first is what all others are compared with."""


def _random(size: int, **more: Any) -> dict[str, Any]:
    return {"sub_token_size": size, "init": "random", "vectors": "per_group", **more}


LORA_SETTINGS = {
    "without VeLoRA": Setting(None),
    "average, M=16": Setting({"sub_token_size": 16}),
    "average, M=4": Setting({"sub_token_size": 4}),
    "average per group, M=16": Setting({"sub_token_size": 16, "vectors": "per_group"}),
    "average, M=16, dense gradient": Setting({"sub_token_size": 16, "gradient": "dense"}),
    "svd per group, M=16": Setting({"sub_token_size": 16, "init": "svd", "vectors": "per_group"}),
    "random per group, M=16": Setting(_random(16)),
    "random per group, M=16, redrawn every 10 steps": Setting(_random(16, refresh_every=10)),
    "random per group, M=4": Setting(_random(4)),
    "random per group, M=4, twice the rate": Setting(_random(4), rate=2.0),
}
COEFFICIENT_SETTINGS = {
    "LoRA, without VeLoRA": Setting(None),
    "average, G=32": Setting({"num_groups": 32}),
    "average, G=32, a third of the rate": Setting({"num_groups": 32}, rate=1 / 3),
    "random per group, G=32": Setting({"num_groups": 32, "init": "random", "vectors": "per_group"}),
    "random per group, G=32, a third of the rate": Setting(
        {"num_groups": 32, "init": "random", "vectors": "per_group"}, rate=1 / 3
    ),
}
STUDIES = {
    "lora-text": Study("glue", "trec-50", "lora", LORA_SETTINGS),
    "lora-vision": Study("vtab", "orientation", "lora", LORA_SETTINGS),
    "coefficients": Study("alpaca", "trec-50", "coefficients-nf4", COEFFICIENT_SETTINGS),
}


@dataclass(frozen=True)
class Cell:
    study: str
    setting: str
    seed: int


def cells(studies: list[str]) -> list[Cell]:
    """Seed by seed, so that what is finished is balanced."""
    return [
        Cell(study, setting, seed)
        for seed in SEEDS
        for study in studies
        for setting in STUDIES[study].settings
    ]


def recipe(cell: Cell, output: str) -> Recipe:
    study = STUDIES[cell.study]
    setting = study.settings[cell.setting]
    plain = setting.velora is None and study.variant == "coefficients-nf4"
    variant = "lora-nf4" if plain else study.variant  # coefficients alone need VeLoRA
    made = BENCHES[study.bench].scales["local"].recipe(study.task, variant, cell.seed)
    velora = setting.velora
    if velora is not None:
        kept = {"targets": ["lora_A"], **(made["velora"] or {})}
        kept = {k: v for k, v in kept.items() if k not in ("num_groups", "sub_token_size")}
        velora = {**kept, "seed": cell.seed, **velora}
    train = {**made["train"], "output": output}
    train["learning_rate"] *= setting.rate
    return Recipe.model_validate({**made, "velora": velora, "train": train})


def measure(cell: Cell) -> dict:
    with tempfile.TemporaryDirectory() as output:
        checked = recipe(cell, output)
        results = run(checked, Options(overwrite=True, report=False), lambda line: None)
    assert results.after is not None
    assert results.memory is not None
    return {
        "benchmark": "sweep_velora",
        **vars(cell),
        "learning_rate": checked.train.learning_rate,
        "score": results.after.score,
        "perplexity": results.after.perplexity,
        "train_loss": results.history[-1].loss,
        "saved_activations": results.memory.saved_activations,
        "seconds": results.run.seconds,
        "command": f"python benchmarks/sweep_velora.py {cell.study}",
        "machine": vars(results.run.machine),
        "versions": results.run.versions,
    }


def done() -> list[dict]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table(name: str) -> str:
    """Means over seeds ± standard error; differences paired by seed."""
    by: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in done():
        if row["study"] == name:
            by[row["setting"]][row["seed"]] = row
    settings = list(STUDIES[name].settings)
    plain = by.get(settings[0], {})
    texts = any(row["perplexity"] is not None for rows in by.values() for row in rows.values())
    header = ["setting", "seeds", "score", "difference", "saved activations"]
    lines = [header + ["perplexity"] * texts]
    for setting in settings:
        rows = by.get(setting)
        if not rows:
            continue
        paired = [100 * (row["score"] - plain[s]["score"]) for s, row in rows.items() if s in plain]
        saved = statistics.mean(row["saved_activations"] for row in rows.values())
        line = [
            setting,
            str(len(rows)),
            _mean([100 * row["score"] for row in rows.values()]),
            "" if setting == settings[0] else _mean(paired, "+.1f"),
            f"{saved / 2**20:.0f} MiB",
        ]
        if texts:
            line.append(_mean([row["perplexity"] for row in rows.values()]))
        lines.append(line)
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(values: list[float], form: str = ".1f") -> str:
    if len(values) < 2:
        return "-" if not values else format(values[0], form)
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{format(statistics.mean(values), form)} ± {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--part", default="1/1", help="such as 1/2: every second cell")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    studies = arguments.studies or list(STUDIES)
    if unknown := [name for name in studies if name not in STUDIES]:
        parser.error(f"unknown study {unknown[0]!r}; there are: {', '.join(STUDIES)}")
    if arguments.table:
        print("\n\n".join(f"**{name}**\n\n{table(name)}" for name in studies))
        return
    index, parts = (int(n) for n in arguments.part.split("/"))
    known = {(row["study"], row["setting"], row["seed"]) for row in done()}
    todo = [c for c in cells(studies)[index - 1 :: parts] if tuple(vars(c).values()) not in known]
    for number, cell in enumerate(todo, 1):
        row = measure(cell)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(todo)}", *vars(cell).values(), f"{row['score']:.4f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
