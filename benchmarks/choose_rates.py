"""Choose the learning rates of a bench: 800 training examples, 200 others to choose by.

    python benchmarks/choose_rates.py vtab|glue|alpaca|pretrain|pretrain-long
        [--variants full,lora] [--part 1/2] [--table]

VTAB-1k's way of choosing: methods of the bench, at several learning rates, on some of its tasks;
the test examples are not seen. Pre-training has half of its scale's tokens, and holds out other
documents. One row for each run in benchmarks/results/choose_rates.jsonl; finished rows are skipped.
--table prints the scores. The rates chosen (best mean score) stand in src/velora_torch/bench/; a
variant that has no rates here takes those of the method it varies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from velora_torch.bench.catalogue import BENCHES
from velora_torch.bench.pretrain import protocol
from velora_torch.training.recipe import Recipe
from velora_torch.training.run import Options, run

ROWS = Path(__file__).parent / "results" / "choose_rates.jsonl"
RATES = {
    "glue": {
        "full": (1e-4, 2e-4, 4e-4, 8e-4),
        "galore": (2e-4, 5e-4, 1e-3),
        "lora": (1e-3, 2e-3, 4e-3, 8e-3),
        "velora-all": (2e-4, 4e-4, 8e-4),
    },
    "vtab": {
        "linear-probe": (3e-3, 1e-2),
        "full": (3e-6, 1e-5, 3e-5, 1e-4),
        "full+velora": (1e-5, 3e-5, 1e-4),
        "ssf": (1e-3, 2e-3, 5e-3),
        "ssf+velora": (2e-3, 5e-3, 1e-2),
        "hydra": (1e-3, 2e-3),
        "hydra+velora": (1e-3, 2e-3, 5e-3),
        "lora": (1e-3, 2e-3),
        "lora+velora": (1e-3, 2e-3, 5e-3),
        "lora+velora-random": (2e-3, 5e-3, 1e-2),
    },
    "alpaca": {
        "lora-bf16": (4e-4, 1e-3, 2e-3, 4e-3),
        "coefficients-nf4": (1e-3, 3e-3),
        "full": (1e-4, 2e-4, 5e-4),
    },
}
TASKS: dict[str, tuple[str, ...]] = {
    "glue": ("trec-50", "vader"),
    "vtab": ("emoji", "count"),
    "alpaca": ("trec-50",),
}
COEFFICIENT_RATES = {
    "vtab": {
        "full+velora": (1e-5, 4e-5, 1.6e-4),
        "full+velora-all": (1e-5, 4e-5, 1.6e-4, 3.2e-4),
        "lora+velora-random": (8e-3, 3.2e-2),
    },
}
"""Rates of the coefficients alone; all else has the rate that the bench gives the variant."""
Pairs = dict[str, tuple[tuple[float, float | None], ...]]
REST = protocol.REST


def _around(best: float, *more: float) -> tuple[tuple[float, float | None], ...]:
    """A rate of the linear layers with its half and its double, and others."""
    return tuple((REST, rate) for rate in (best / 2, best, 2 * best, *more))


SMALL: Pairs = {
    "full": (*_around(1e-3), (REST / 2, 1e-3), (2 * REST, 1e-3)),
    "velora-all": _around(1e-3, 4e-3),
    "velora-not-qk": _around(1e-3),
    "velora-value-down": _around(1e-3),
    "velora-value-down-faster": _around(1e-3),
    "velora-not-qk-faster": _around(1e-3),
    "lora": _around(2e-3),
    "relora": _around(2e-3),
    "galore": _around(2e-3),
    "galore-packaged": _around(2e-3),
    "flora": _around(5e-4),
    "apollo": _around(4e-3, 1e-3),
    "galore-twelfth": _around(4e-3),
    "galore-twelfth-packaged": _around(4e-3),
    "velora-all-gaussian": _around(2e-3),
    "velora-all-average": _around(2e-3, 5e-4),
    "velora-all-running": _around(2.5e-4, 1e-3, 2e-3),
    "velora-all-each-step": _around(1e-3),
}
LARGER: Pairs = {
    "full": _around(2.5e-4, 1e-3),
    "velora-all": _around(1e-3),
    "velora-not-qk": _around(1e-3),
    "velora-value-down": _around(5e-4),
    "lora": _around(1e-3),
    "relora": _around(1e-3),
    "galore": _around(1e-3),
    "galore-packaged": _around(1e-3),
    "flora": _around(2.5e-4),
    "apollo": _around(1e-3),
    "galore-twelfth": _around(2e-3),
    "galore-twelfth-packaged": _around(2e-3),
}
LONGER: Pairs = {
    "full": _around(1e-3),
    "velora-all": _around(2e-3),
    "velora-not-qk": _around(1e-3),
    "velora-value-down": _around(1e-3),
    "lora": _around(2e-3),
}


class FromScratch(NamedTuple):
    """A scale of pre-training."""

    recipe: Callable[[str, str, int, protocol.Rates], dict[str, Any]]
    """Of a task, a variant, a seed and rates."""
    tried: dict[str, Pairs]
    """By task and variant: the rate of the rest, and that of the blocks' linear layers in whatever
    form."""


PRE_TRAINING = {
    "pretrain": FromScratch(protocol.local_recipe, {"llama-3m": SMALL, "llama-15m": LARGER}),
    "pretrain-long": FromScratch(protocol.long_recipe, {"llama-3m": LONGER}),
}
TASKS |= {bench: tuple(of.tried) for bench, of in PRE_TRAINING.items()}
TRAIN, CHOOSE = 800, 200
SEED = 100
"""Unlike the seeds of the benches; also of the split that pre-training holds out."""


TIES: dict[str, dict[str, Pairs]] = {
    "pretrain": {
        "llama-3m": {
            "velora-all": ((REST, 1e-3), (REST, 2e-3)),
            "apollo": ((REST, 2e-3), (REST, 4e-3)),
        }
    }
}
"""Rates less than 1% apart with the first seed, which two more seeds decide between."""

Cell = tuple[str, str, float | None, float | None, int]
"""Task, variant, learning rate (None: the bench's), that of the coefficients or, in pre-training,
of the blocks' linear layers, if it is another, and the seed."""

Tried = tuple[str, str, float | None, float | None]
"""A cell without its seed."""

Line = tuple[str, float | None, float | None]
"""Variant and its two rates."""


def lines(bench: str, task: str) -> list[Line]:
    """What is tried on a task."""
    if bench in PRE_TRAINING:
        tried = PRE_TRAINING[bench].tried[task]
        return [(v, *pair) for v, pairs in tried.items() for pair in pairs]
    both = [(v, rate, None) for v, rates in RATES[bench].items() for rate in rates]
    own = COEFFICIENT_RATES.get(bench, {}).items()
    return [*both, *((v, None, rate) for v, rates in own for rate in rates)]


def cells(bench: str) -> list[Cell]:
    made = [(task, *line, SEED) for task in TASKS[bench] for line in lines(bench, task)]
    tied = [
        (task, v, *pair)
        for task, of in TIES.get(bench, {}).items()
        for v, pairs in of.items()
        for pair in pairs
    ]
    return made + [(*line, SEED + more) for more in (1, 2) for line in tied]


def measure(
    bench: str, task: str, variant: str, rate: float | None, own: float | None, seed: int
) -> dict:
    if bench in PRE_TRAINING:
        assert rate is not None
        recipe = PRE_TRAINING[bench].recipe(task, variant, seed, protocol.Rates(rate, own))
        recipe["train"]["tokens"] //= 2
        held_out: dict = {"seed": SEED}  # of the split
    else:
        recipe = BENCHES[bench].scales["local"].recipe(task, variant, seed)
        held_out = {
            "max_train": TRAIN,
            "max_eval": CHOOSE,
            "eval_split": "train",
            "eval_fraction": CHOOSE / (TRAIN + CHOOSE),
        }
        if rate is not None:
            recipe["train"]["learning_rate"] = rate
        if own is not None:
            recipe["train"]["coefficient_learning_rate"] = own
    with tempfile.TemporaryDirectory() as output:
        train = {**recipe["train"], "output": output}
        data = {**recipe["data"], **held_out}
        checked = Recipe.model_validate({**recipe, "data": data, "train": train})
        results = run(checked, Options(overwrite=True, report=False), lambda line: None)
    if results.after is None:
        raise SystemExit("stopped before its end; started again it goes on after the finished rows")
    return {
        "benchmark": "choose_rates",
        "bench": bench,
        "task": task,
        "variant": variant,
        "learning_rate": rate,
        "coefficient_learning_rate": own,  # see Cell
        "seed": seed,
        "metric": results.after.metric,
        "score": results.after.score,
        "perplexity": results.after.perplexity,
        "text": results.run.data.get("digests"),
        "examples": [None if bench in PRE_TRAINING else TRAIN, results.after.examples],
        "command": f"python benchmarks/choose_rates.py {bench}",
        "machine": vars(results.run.machine),
        "versions": results.run.versions,
    }


def done(bench: str) -> list[dict]:
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return [row for row in map(json.loads, lines) if row["bench"] == bench]


def key(row: dict) -> Cell:
    rates = row["learning_rate"], row.get("coefficient_learning_rate")
    return row["task"], row["variant"], *rates, row.get("seed", SEED)


def scores_of(bench: str) -> dict[Tried, list[float]]:
    """Scores on the examples to choose by, one for each seed: in per cent, or perplexities."""
    unit = 1 if bench in PRE_TRAINING else 100
    seeds: dict[Tried, list[float]] = {}
    for row in done(bench):
        seeds.setdefault(key(row)[:-1], []).append(unit * row["score"])
    return seeds


def table(bench: str, variants: list[str]) -> str:
    """Means over seeds."""
    scores = {cell: statistics.mean(of) for cell, of in scores_of(bench).items()}
    tasks = TASKS[bench]
    head = f"| method | rate | own rate | {' | '.join(tasks)} | mean |"
    printed = [head, "| --- " * (4 + len(tasks)) + "|"]
    every = dict.fromkeys(line for task in tasks for line in lines(bench, task))
    shown = [line for line in every if line[0] in variants]
    for variant, rate, own in sorted(shown, key=lambda line: variants.index(line[0])):
        line = [scores.get((task, variant, rate, own)) for task in tasks]
        numbers = " | ".join("-" if score is None else f"{score:.1f}" for score in line)
        known = [score for score in line if score is not None]
        mean = "-" if len(known) < len(line) else f"{statistics.mean(known):.1f}"
        rates = [f"{r:g}" if r is not None else "" for r in (rate, own)]
        printed.append(f"| {variant} | {' | '.join(rates)} | {numbers} | {mean} |")
    return "\n".join(printed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", choices=list(TASKS))
    parser.add_argument("--variants", help="names with commas between them; without it all")
    parser.add_argument("--part", default="1/1", help="such as 1/2: every second run")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    every = cells(arguments.bench)
    tried = list(dict.fromkeys(variant for _, variant, *_ in every))
    chosen = arguments.variants.split(",") if arguments.variants else tried
    if other := sorted(set(chosen) - set(tried)):
        parser.error(
            f"no rates to try for {', '.join(other)}; there are some for {', '.join(tried)}"
        )
    if arguments.table:
        print(table(arguments.bench, chosen))
        return
    index, parts = (int(n) for n in arguments.part.split("/"))
    known = {key(row) for row in done(arguments.bench)}
    todo = [cell for cell in every if cell[1] in chosen and cell not in known][index - 1 :: parts]
    for number, cell in enumerate(todo, 1):
        row = measure(arguments.bench, *cell)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(todo)}", *cell, f"{row['score']:.4f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
