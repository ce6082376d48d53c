"""The results in the README and on the pages of pre-training and analysis, made from their rows.

    python benchmarks/result_tables.py            # print them
    python benchmarks/result_tables.py --write    # put them between the marks of each page

README.md has three tables: fine-tuning, method by method without VeLoRA and with it; pre-training
against full AdamW; times of training steps. In docs/results, pretraining.md has one for each model,
pretraining-longer.md too, of more tokens; pretraining-details.md has three of how methods stand on
the way, one of how stable their order is, one that compares them seed by seed and one of the sweep
of learning rates; analysis.md has one that compares choices of v.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from marked import replaced
from pretraining_tables import (
    PAIRED,
    PAIRED_VECTORS,
    PRE_TRAINING_ROWS,
    course,
    millions,
    order,
    paired,
    pre_trained,
    rates,
    step,
    tasks_of,
)
from result_rows import RESULTS, SCALE, finished
from velora_torch.atomic import write_whole
from velora_torch.bench.catalogue import BENCHES
from velora_torch.bench.pretrain.table import Line, lines_of
from velora_torch.bench.speed.cases import CASES
from velora_torch.bench.speed.rows import against, read_rows
from velora_torch.bench.speed.table import format_spread, found_rows
from velora_torch.bench.table import format_change, format_estimate, summarise
from velora_torch.bench.writing import MISSING, known, markdown_grid
from velora_torch.report.quantities import format_bytes, format_ratio

ROOT = Path(__file__).parent.parent
FINE_TUNED = {
    "glue": "MiniLM, 6 text tasks",
    "vtab": "DINOv2-S, 7 image tasks",
    "alpaca": "SmolLM2-135M, instructions",
}
"""What is fine-tuned, by bench."""
PRE_TRAINED = (
    *("full", "full-8bit", "full-gc", "lora", "relora"),
    *("galore", "galore-twelfth", "apollo", "flora"),
    *("velora-paper", "velora-value-down", "velora-value-down-redrawn", "velora-not-qk"),
    *("velora-all", "velora-all-fixed", "lora-velora"),
    *("velora-value-down-8bit", "velora-value-down-redrawn-8bit"),
    *("velora-all-m4", "velora-all-m4-8bit"),
    *("full-8bit-gc-chunked", "velora-value-down-8bit-gc-chunked", "velora-all-m4-8bit-gc-chunked"),
)
"""Variants in the README; the pages of pre-training have them all."""
TIMED = (
    ("llama-1024", "factored", "plain", "all weights, 4 LLaMA blocks of width 1024"),
    ("llama-2048", "factored", "plain", "all weights, 2 LLaMA blocks of width 2048"),
    ("llama-2048", "factored+gc", "plain+gc", "the same, both with gradient checkpointing"),
    (
        "llama-2048",
        "factored+recompute",
        "plain+gc",
        "the same with `recompute`, over plain with gradient checkpointing",
    ),
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


def _fine_tuning() -> str:
    body = []
    for bench, model in FINE_TUNED.items():
        own = finished(bench)
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
    """A row for each method: perplexities of every model and length, then what a step holds."""
    header, columns = ["pre-trained"], []
    found = {scale: finished("pretrain", scale, of) for scale, of in PRE_TRAINING_ROWS.items()}
    short = found[SCALE]
    for task in short.bench.scales[SCALE].tasks:
        for own in found.values():
            if task in tasks_of(own):
                header.append(f"{task}, {millions(own.rows, task)}")
                columns.append(_by_name(lines_of(own, task), _against_full))
        lines = lines_of(short, task)
        header += ["optimizer state", "peak", "step"]
        columns += [
            _by_name(lines, lambda of: known(of.memory["optimizer_state"], format_bytes)),
            _by_name(lines, lambda of: known(of.peak, format_bytes)),
            _by_name(lines, step),
        ]
    body = [
        [variant.label, *(column.get(variant.name, MISSING) for column in columns)]
        for variant in short.bench.variants
        if variant.name in PRE_TRAINED and any(variant.name in column for column in columns)
    ]
    return markdown_grid(header, body)


def _by_name(lines: Sequence[Line], cell: Callable[[Line], str]) -> dict[str, str]:
    return {line.variant.name: cell(line) for line in lines}


def _against_full(line: Line) -> str:
    """Full training's perplexity; another method's, less that, in per cent."""
    if line.relative is None:
        return format_estimate(line.perplexity, 1.0)
    return f"{format_change(line.relative)}%"


def _speed() -> str:
    rows = found_rows(read_rows(RESULTS / "speed" / "rows.jsonl"), CASES)
    body = []
    for case, variant, base, words in TIMED:
        ratio = against(rows.get(case, ()), variant, base)
        body.append([words, format_spread(ratio) if ratio else MISSING])
    return markdown_grid(["time of a training step, with VeLoRA / without", ""], body)


ANALYSIS, PRE_TRAINING = "docs/results/analysis.md", "docs/results/pretraining.md"
LONGER = "docs/results/pretraining-longer.md"
DETAILS = "docs/results/pretraining-details.md"
PLACES = (
    Place("README.md", "results", results),
    *(
        Place(PRE_TRAINING, task, partial(pre_trained, task))
        for task in BENCHES["pretrain"].scales[SCALE].tasks
    ),
    Place(LONGER, "llama-3m-long", partial(pre_trained, "llama-3m", "long")),
    Place(LONGER, "llama-15m-long", partial(pre_trained, "llama-15m", "long")),
    Place(DETAILS, "pairs", partial(paired, PAIRED)),
    Place(DETAILS, "course", partial(course, "llama-3m", SCALE)),
    Place(DETAILS, "long-course", partial(course, "llama-3m", "long")),
    Place(DETAILS, "larger-long-course", partial(course, "llama-15m", "long")),
    Place(DETAILS, "order", order),
    Place(DETAILS, "rates", rates),
    Place(ANALYSIS, "ablations", partial(paired, PAIRED_VECTORS)),
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
