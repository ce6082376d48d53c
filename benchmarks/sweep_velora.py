"""Which compression serves a method best: group size, choice of v, redraw, gradient, rate.

    python benchmarks/sweep_velora.py [STUDY ...] [--part 1/2] [--table]

A study takes a variant of a bench and some of its tasks, and trains it with other settings of
VeLoRA (and of the learning rate, where its name says so); everything else is the bench's, the test
examples included, over three seeds. One row for each run in benchmarks/results/sweep_velora.jsonl;
finished rows are skipped, and what a bench has run with the very same recipe is taken from its own
rows. --table prints the means and the differences to the method without VeLoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from velora_torch.bench.catalogue import BENCHES
from velora_torch.bench.grid import fingerprint
from velora_torch.bench.runner import read_rows
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
    coefficients: float = 1.0
    """The learning rate of the coefficients alone, as a multiple of that of all others."""


@dataclass(frozen=True)
class Study:
    bench: str
    tasks: tuple[str, ...]
    variant: str
    settings: dict[str, Setting]
    """By name; the first is what all others are compared with."""


def _random(size: int, **more: Any) -> dict[str, Any]:
    return {"sub_token_size": size, "init": "random", "vectors": "per_group", **more}


LORA_SETTINGS = {
    "without VeLoRA": Setting(None),
    "average, M=16": Setting({"sub_token_size": 16}),
    "average per group, M=16": Setting({"sub_token_size": 16, "vectors": "per_group"}),
    "average, M=16, dense gradient": Setting({"sub_token_size": 16, "gradient": "dense"}),
    "svd per group, M=16": Setting({"sub_token_size": 16, "init": "svd", "vectors": "per_group"}),
    "random per group, M=16": Setting(_random(16)),
    "random per group, M=16, redrawn every 10 steps": Setting(_random(16, refresh_every=10)),
    "random per group, M=4": Setting(_random(4)),
    "without VeLoRA, twice the rate": Setting(None, rate=2.0),
    "random per group, M=4, four times the rate for the coefficients": Setting(
        _random(4), coefficients=4.0
    ),
    "random per group, M=4, 16 times the rate for the coefficients": Setting(
        _random(4), coefficients=16.0
    ),
    "random per group, M=4, twice the rate": Setting(_random(4), rate=2.0),
}
ALL_LINEAR = {"targets": "all-linear"}
FULL_SETTINGS = {
    "without VeLoRA": Setting(None),
    "value, down: average, M=32": Setting({"sub_token_size": 32}),
    "value, down: average, M=8": Setting({"sub_token_size": 8}),
    "value, down: average, M=32, dense gradient": Setting(
        {"sub_token_size": 32, "gradient": "dense"}
    ),
    "value, down: random per group, M=8": Setting(_random(8)),
    "all: random per group, M=8, redrawn every 10 steps": Setting(
        {**ALL_LINEAR, **_random(8, refresh_every=10)}
    ),
    "all: the same, twice the rate": Setting(
        {**ALL_LINEAR, **_random(8, refresh_every=10)}, rate=2.0
    ),
    "all: the same, four times the rate": Setting(
        {**ALL_LINEAR, **_random(8, refresh_every=10)}, rate=4.0
    ),
    "all: the same, four times the rate for the coefficients": Setting(
        {**ALL_LINEAR, **_random(8, refresh_every=10)}, coefficients=4.0
    ),
    "all: the same, 16 times the rate for the coefficients": Setting(
        {**ALL_LINEAR, **_random(8, refresh_every=10)}, coefficients=16.0
    ),
    "value, down: average, M=32, four times the rate for the coefficients": Setting(
        {"sub_token_size": 32}, coefficients=4.0
    ),
    "value, down: random per group, M=8, four times the rate for the coefficients": Setting(
        _random(8), coefficients=4.0
    ),
}
SSF_SETTINGS = {
    "without VeLoRA": Setting(None),
    "average, M=32": Setting({"sub_token_size": 32}),
    "average, M=8": Setting({"sub_token_size": 8}),
    "random per group, M=8": Setting(_random(8)),
}
ADAPTERS = {"targets": ["lora_A"]}
QLORA_SETTINGS = {
    "without VeLoRA": Setting(None),
    "value, down: average, G=32": Setting({"num_groups": 32}),
    "all: random per group, M=4": Setting({**ADAPTERS, **_random(4)}),
    "all: random per group, M=4, four times the rate for the coefficients": Setting(
        {**ADAPTERS, **_random(4)}, coefficients=4.0
    ),
}
COEFFICIENT_SETTINGS = {
    "LoRA, without VeLoRA": Setting(None),
    "average, G=32": Setting({"num_groups": 32}),
    "average, G=32, a third of the rate": Setting({"num_groups": 32}, rate=1 / 3),
    "random per group, G=32, a third of the rate": Setting(
        {"num_groups": 32, "init": "random", "vectors": "per_group"}, rate=1 / 3
    ),
}
STUDIES = {
    "full-vision": Study("vtab", ("mnist-5k", "count"), "full+velora", FULL_SETTINGS),
    "lora-text": Study("glue", ("trec-50",), "lora+velora", LORA_SETTINGS),
    "lora-vision": Study("vtab", ("count", "orientation"), "lora+velora-random", LORA_SETTINGS),
    "qlora": Study("alpaca", ("trec-50",), "qlora+velora", QLORA_SETTINGS),
    "coefficients": Study("alpaca", ("trec-50",), "coefficients-nf4", COEFFICIENT_SETTINGS),
    "ssf-vision": Study("vtab", ("count", "orientation"), "ssf+velora", SSF_SETTINGS),
}


@dataclass(frozen=True)
class Cell:
    study: str
    setting: str
    task: str
    seed: int


def cells(studies: list[str]) -> list[Cell]:
    """Seed by seed, so that what is finished is balanced."""
    return [
        Cell(study, setting, task, seed)
        for study in studies
        for seed in SEEDS
        for task in STUDIES[study].tasks
        for setting in STUDIES[study].settings
    ]


def recipe(cell: Cell, output: str = "unused") -> Recipe:
    study = STUDIES[cell.study]
    setting = study.settings[cell.setting]
    variant = study.variant
    if setting.velora is None:  # the bench's row without VeLoRA
        variant = BENCHES[study.bench].variant(variant).base or variant
    made = BENCHES[study.bench].scales["local"].recipe(cell.task, variant, cell.seed)
    velora = setting.velora
    if velora is not None:
        unsized = {"num_groups", "sub_token_size", "init", "vectors"}
        kept = {key: value for key, value in made["velora"].items() if key not in unsized}
        velora = {**kept, "seed": cell.seed, **velora}
    train = {**made["train"], "output": output}
    train["learning_rate"] *= setting.rate
    if setting.coefficients != 1:
        train["coefficient_learning_rate"] = setting.coefficients * train["learning_rate"]
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


def done(studies: list[str]) -> dict[Cell, dict]:
    """What has been measured: by this script, or by a bench with the same recipe."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    own = {Cell(r["study"], r["setting"], r["task"], r["seed"]): r for r in map(json.loads, lines)}
    benches: dict[tuple, dict] = {}
    for name in {STUDIES[study].bench for study in studies}:
        for row in read_rows(ROWS.parent / name / "rows.jsonl"):
            benches[row.task, row.seed, row.fingerprint] = {
                "score": row.score,
                "perplexity": row.perplexity,
                "saved_activations": row.memory["saved_activations"],
            }
    found = {}
    for cell in cells(studies):
        whole = recipe(cell).model_dump(mode="json")
        same = own.get(cell) or benches.get((cell.task, cell.seed, fingerprint(whole)))
        if same is not None:
            found[cell] = same
    return found


def table(name: str) -> str:
    """Means over tasks and seeds; differences paired by both, their error over seeds."""
    study, found = STUDIES[name], done([name])
    settings = list(study.settings)
    texts = any(row["perplexity"] is not None for row in found.values())
    header = ["setting", "seeds", "score", "difference", "saved activations"]
    lines = [header + ["perplexity"] * texts, ["---"] * (len(header) + texts)]
    scores = {setting: _by_seed(found, name, setting) for setting in settings}
    for setting, own in scores.items():
        if not own:
            continue
        plain = scores[settings[0]]
        gaps = [own[seed] - plain[seed] for seed in own if seed in plain]
        whole = [[found[Cell(name, setting, task, seed)] for task in study.tasks] for seed in own]
        saved = statistics.mean(row["saved_activations"] for rows in whole for row in rows)
        line = [
            setting,
            str(len(own)),
            _mean(list(own.values())),
            "" if setting == settings[0] else _mean(gaps, "+.1f"),
            f"{saved / 2**20:.0f} MiB",
        ]
        if texts:
            line.append(_mean([row["perplexity"] for rows in whole for row in rows]))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_seed(found: dict[Cell, dict], name: str, setting: str) -> dict[int, float]:
    """The mean score over a study's tasks in per cent, for each seed that has them all."""
    means = {}
    for seed in SEEDS:
        cells_ = [Cell(name, setting, task, seed) for task in STUDIES[name].tasks]
        if all(cell in found for cell in cells_):
            means[seed] = 100 * statistics.mean(found[cell]["score"] for cell in cells_)
    return means


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
    known = done(studies)
    open_cells = [cell for cell in cells(studies) if cell not in known]
    todo = open_cells[index - 1 :: parts]
    for number, cell in enumerate(todo, 1):
        row = measure(cell)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(todo)}", *vars(cell).values(), f"{row['score']:.4f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
