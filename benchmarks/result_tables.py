"""The results in the README and on the pages of pre-training and analysis, made from their rows.

    python benchmarks/result_tables.py            # print them
    python benchmarks/result_tables.py --write    # put them between the marks of each page

README.md has three tables: fine-tuning, method by method without VeLoRA and with it; pre-training
against full AdamW; times of training steps. docs/results/pretraining.md has one for each model,
one for more tokens, one that compares methods seed by seed and one of the sweep of learning rates;
docs/results/analysis.md has that of the ablations.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import choose_rates
from marked import replaced
from velora_torch.atomic import write_whole
from velora_torch.bench.catalogue import BENCHES
from velora_torch.bench.collect import collect
from velora_torch.bench.grid import Finished
from velora_torch.bench.pretrain.protocol import LOCAL_RATES, REST
from velora_torch.bench.pretrain.table import CATEGORIES, Line, lines_of
from velora_torch.bench.speed.cases import CASES
from velora_torch.bench.speed.rows import against, read_rows
from velora_torch.bench.speed.table import format_spread, found_rows
from velora_torch.bench.statistics import by_variant, estimate
from velora_torch.bench.table import format_change, format_estimate, summarise
from velora_torch.bench.writing import MISSING, known, markdown_grid
from velora_torch.report.quantities import format_bytes, format_ratio, format_seconds

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCALE = "local"
FINE_TUNED = {
    "glue": "MiniLM, 6 text tasks",
    "vtab": "DINOv2-S, 7 image tasks",
    "alpaca": "SmolLM2-135M, instructions",
}
"""What is fine-tuned, by bench."""
PRE_TRAINED = (
    *("full", "full-8bit", "full-gc", "lora", "apollo", "flora"),
    *("galore", "galore-eighth", "galore-twelfth"),
    *("velora-paper", "velora-value-down", "velora-not-qk", "velora-all", "velora-all-fixed"),
    *("velora-value-down-8bit", "velora-all-8bit", "velora-all-m4-8bit"),
    "velora-value-down-8bit-gc",
)
"""Variants in the README; docs/results/pretraining.md has them all."""
_PROJECTED = ("galore", "apollo", "flora")
_ALL = ("full", "velora-all", *_PROJECTED)
PAIRED = (
    ("llama-3m", "velora-value-down", ("full", "lora")),
    ("llama-3m", "velora-not-qk", ("full", *_PROJECTED)),
    ("llama-3m", "velora-all", ("full", "galore-twelfth", "apollo", "flora")),
    ("llama-3m", "velora-all-fixed", (*_ALL, "galore-twelfth")),
    ("llama-3m", "velora-all-m4-8bit", ("full", "velora-all-m4", *_PROJECTED)),
    ("llama-15m", "velora-value-down", ("full",)),
    ("llama-15m", "velora-not-qk", ("full", "lora", *_PROJECTED)),
    ("llama-15m", "velora-all", ("full", "galore-twelfth", *_PROJECTED)),
    ("llama-15m", "velora-all-fixed", (*_ALL, "galore-twelfth")),
    ("llama-15m", "velora-all-m4-8bit", ("full", "flora")),
)
"""Task, variant, and the variants that the page of pre-training compares it with."""
PRE_TRAINING_ROWS = {SCALE: "pretrain", "long": "pretrain-long"}
"""Folders by scale."""
VARIED_ON = "llama-3m"
VARIED = (
    *("full", "velora-value-down", "velora-value-down-signs"),
    *("velora-not-qk", "velora-not-qk-average", "velora-qk", "velora-qk-faster"),
    *("velora-all", "velora-all-fixed", "velora-all-often"),
    *("velora-all-gaussian", "velora-all-average", "velora-all-running"),
)
"""What the page of the analysis explains, and on which model."""
QUALITY = ["method", "seeds", "perplexity", "% against full"]
TIMED = (
    ("llama-1024", "factored", "plain", "all weights, 4 LLaMA blocks of width 1024"),
    ("llama-2048", "factored", "plain", "all weights, 2 LLaMA blocks of width 2048"),
    ("llama-2048", "factored+gc", "plain+gc", "the same, both with gradient checkpointing"),
    ("llama-2048", "factored+compile", "plain+compile", "the same, both compiled"),
    ("llama-2048-fp32", "factored", "plain", "the same in float32, on another CPU"),
    ("llama-1024-lora", "lora+velora", "lora", "LoRA, width 1024"),
    ("llama-1024-lora", "lora+velora", "peft-velora", "LoRA, width 1024, over PEFT's own VeLoRA"),
)
"""Case, variant, what it is compared with, and all that in words."""


@dataclass(frozen=True)
class Place:
    """What stands between two marks of a page."""

    page: str
    """Path from the project's root."""
    name: str
    make: Callable[[], str]
    """Returns Markdown."""

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: made by benchmarks/result_tables.py -->"

    @property
    def end(self) -> str:
        return f"<!-- end of {self.name} -->"


def results() -> str:
    """The README's three tables."""
    return "\n\n".join((_fine_tuning(), _pre_training(), _speed()))


def _finished(bench: str, scale: str = SCALE, folder: str | None = None) -> Finished:
    finished, _stale = collect(BENCHES[bench], scale, RESULTS / (folder or bench))
    return finished


def _fine_tuning() -> str:
    body = []
    for bench, model in FINE_TUNED.items():
        own = _finished(bench)
        summary = summarise(own.bench, own.scale, own.rows, own.times, own.expected)
        average = {line.label: format_estimate(line.average) for line in summary.lines}
        for pair in summary.pairs:
            if "VeLoRA" in pair.label:
                scores = [average[pair.base], average[pair.label], format_change(pair.gap)]
                ratios = [known(ratio, format_ratio) for ratio in (pair.memory, pair.time)]
                body.append([model, pair.label, *scores, *ratios])
    header = ["fine-tuned", "method", "without", "with", "points", "memory", "step"]
    return markdown_grid(header, body)


def _pre_training() -> str:
    body = []
    for scale, folder in PRE_TRAINING_ROWS.items():
        own = _finished("pretrain", scale, folder)
        for task in own.bench.scales[scale].tasks:
            tokens = next(row.details["tokens"] for row in own.rows if row.task == task)
            for line in lines_of(own, task):
                if line.variant.name in PRE_TRAINED:
                    quality = [format_estimate(line.perplexity, 1.0), format_change(line.relative)]
                    sizes = (line.memory["optimizer_state"], line.peak)
                    memory = [known(size, format_bytes) for size in sizes]
                    step = known(line.step and line.step.median, format_seconds)
                    model = f"{task}, {tokens / 1e6:.1f}M tokens"
                    body.append([model, line.variant.label, *quality, *memory, step])
    header = ["pre-trained", "method", "perplexity", "% against full", "optimizer state"]
    header += ["peak", "step"]
    return markdown_grid(header, body)


def _speed() -> str:
    rows = found_rows(read_rows(RESULTS / "speed" / "rows.jsonl"), CASES)
    body = []
    for case, variant, base, words in TIMED:
        ratio = against(rows.get(case, ()), variant, base)
        body.append([words, format_spread(ratio) if ratio else MISSING])
    return markdown_grid(["time of a training step, with VeLoRA / without", ""], body)


def pre_trained(task: str, scale: str = SCALE) -> str:
    """All methods on one model, with what a step holds."""
    own, body = _finished("pretrain", scale, PRE_TRAINING_ROWS[scale]), []
    lines = lines_of(own, task)
    first = lines[0].step
    for line in lines:
        sizes = (*line.memory.values(), line.peak)
        if line.step is None or first is None:
            step = ""
        elif line is lines[0]:
            step = format_seconds(first.median)
        else:
            step = format_ratio(line.step.median / first.median)
        memory = [known(size, format_bytes) for size in sizes]
        body.append([*_quality(own, task, line), *memory, *([step] if first else [])])
    header = [*QUALITY, *CATEGORIES.values(), "peak of a step", *(["step"] if first else [])]
    return markdown_grid(header, body)


def ablations() -> str:
    """Other vectors, layers and redraws, beside the methods that they vary."""
    own = _finished("pretrain")
    varied = _finished("pretrain", folder="pretrain-ablations")
    both = replace(own, rows=[*own.rows, *varied.rows])
    lines = {line.variant.name: line for line in lines_of(both, VARIED_ON)}
    body = [_quality(both, VARIED_ON, lines[name]) for name in VARIED if name in lines]
    return markdown_grid(QUALITY, body)


def _quality(own: Finished, task: str, line: Line) -> list[str]:
    name = line.variant.name
    seeds = sum(row.task == task and row.variant == name for row in own.rows)
    return [
        line.variant.label,
        str(seeds),
        format_estimate(line.perplexity, 1.0),
        "" if line.relative is None else format_change(line.relative),
    ]


def rates() -> str:
    """What the sweep of learning rates has found: the bench's own rates are bold."""
    own, body = BENCHES["pretrain"], []
    tasks = own.scales[SCALE].tasks
    for variant in choose_rates.SMALL | choose_rates.LARGER:
        tried = [_sweep(task, variant) for task in tasks]
        body.append([own.variant(variant).label, *tried])
    return markdown_grid(["", *tasks], body, words=tasks)


def _sweep(task: str, variant: str) -> str:
    """Rates of the linear layers and perplexities, those of the bench's rate of the rest."""
    found = {
        linear: scores
        for (at, name, rest, linear), scores in choose_rates.scores_of("pretrain").items()
        if (at, name, rest) == (task, variant, REST) and linear is not None
    }
    shown = []
    for linear in sorted(found):
        score = f"{statistics.mean(found[linear]):.1f}" + ("†" if len(found[linear]) > 1 else "")
        chosen = linear == LOCAL_RATES[task][variant].linear
        shown.append(f"**{score}**" if chosen else score)
    return f"{', '.join(map(_short, sorted(found)))}: {', '.join(shown)}" if found else ""


def _short(rate: float) -> str:
    """1.25e-4."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def paired() -> str:
    """Perplexity of a method over another's, less 1, in per cent: paired by seed, and each seed."""
    own, body = _finished("pretrain"), []
    scores = by_variant(own.rows)
    for task, variant, others in PAIRED:
        for other in others:
            mine, its = scores[variant][task], scores[other][task]
            ratios = [mine[seed] / its[seed] - 1 for seed in sorted(mine.keys() & its.keys())]
            labels = [own.bench.variant(name).label for name in (variant, other)]
            each = ", ".join(f"{100 * ratio:+.1f}" for ratio in ratios)
            body.append([task, *labels, format_change(estimate(ratios)), each])
    header = ["model", "method", "compared with", "%", "each seed"]
    return markdown_grid(header, body, words=header[1:3])


PRE_TRAINING, ANALYSIS = "docs/results/pretraining.md", "docs/results/analysis.md"
PLACES = (
    Place("README.md", "results", results),
    *(
        Place(PRE_TRAINING, task, partial(pre_trained, task))
        for task in BENCHES["pretrain"].scales[SCALE].tasks
    ),
    Place(PRE_TRAINING, "llama-3m-long", partial(pre_trained, "llama-3m", "long")),
    Place(PRE_TRAINING, "pairs", paired),
    Place(PRE_TRAINING, "rates", rates),
    Place(ANALYSIS, "ablations", ablations),
)


def with_results(page: str, text: str) -> str:
    """The text of a page with today's tables between its marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    for place in PLACES:
        if place.page == page:
            text = replaced(text, place.begin, place.make(), place.end)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the pages")
    if not parser.parse_args().write:
        print("\n\n".join(f"{place.page}, {place.name}\n\n{place.make()}" for place in PLACES))
        return
    for page in dict.fromkeys(place.page for place in PLACES):
        text = (ROOT / page).read_text(encoding="utf-8")
        write_whole(ROOT / page, with_results(page, text))


if __name__ == "__main__":
    main()
