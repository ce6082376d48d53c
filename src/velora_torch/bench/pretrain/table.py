"""The table of `bench pretrain`: perplexity by size, what a step holds, and how fast it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from velora_torch.bench.grid import Finished, Row, Variant
from velora_torch.bench.statistics import Estimate, estimate
from velora_torch.bench.table import format_change, format_estimate
from velora_torch.bench.timing import newest_with
from velora_torch.bench.writing import MISSING, known, markdown_grid, origin
from velora_torch.report.quantities import format_bytes, format_ratio, format_seconds

CATEGORIES = {
    "saved_activations": "saved activations",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
}


@dataclass(frozen=True)
class Line:
    """A variant of one size in numbers; None: not measured."""

    variant: Variant
    rates: tuple[float, ...]
    """Learning rate of embeddings, norms and head, and of the linear layers where it is another."""
    perplexity: Estimate | None
    relative: Estimate | None
    """Perplexity over that of the variant it is compared with, paired by seed, less 1."""
    memory: dict[str, float | None]
    peak: float | None
    """The largest moment of a step, in bytes."""
    tokens_per_second: float | None
    seconds: float | None
    """Of a step: the ratio times the newest median of the variant it is compared with."""
    ratio: float | None
    """Of a step's time over that of the other variant, in the newest session that has both."""
    curve: list[tuple[float, float]]
    """(tokens, perplexity), means over seeds."""
    train_seconds: float | None
    """Steps times the time of one."""


def lines_of(finished: Finished, task: str) -> list[Line]:
    """The lines of one size, in the order of the bench's variants."""
    rows = [row for row in finished.rows if row.task == task]
    variants = finished.bench.variants
    by_variant = {v.name: [row for row in rows if row.variant == v.name] for v in variants}
    lines = []
    for variant in variants:
        own = by_variant[variant.name]
        if not own:
            continue
        seconds, ratio = _timed(finished, task, variant)
        first = own[0]
        tokens = first.details["tokens"]
        per_step = _step_tokens(first)
        lines.append(
            Line(
                variant,
                (
                    first.recipe["train"]["learning_rate"],
                    *first.recipe["train"]["learning_rates"].values(),
                ),
                estimate([row.score for row in own]),
                _relative(own, by_variant.get(variant.base or "", [])),
                {name: _mean_memory(own, name) for name in CATEGORIES},
                _mean(own, lambda row: row.details.get("peak_bytes")),
                None if seconds is None else per_step / seconds,
                seconds,
                ratio,
                _curve(own),
                None if seconds is None else tokens / per_step * seconds,
            )
        )
    return lines


def _timed(finished: Finished, task: str, variant: Variant) -> tuple[float | None, float | None]:
    """Seconds of a variant's step, and its ratio; sessions differ in more than their variants."""
    times = [one for one in finished.times if one.task == task]
    base = variant.base or variant.name
    both = newest_with(times, [variant.name, base])
    if not both:
        alone = newest_with(times, [variant.name]).get(variant.name)
        return None if alone is None else alone.median, None
    ratio = both[variant.name].median / both[base].median
    return ratio * newest_with(times, [base])[base].median, ratio


def report(finished: Finished, output: Path) -> str:
    """Write the plots, and return table.md."""
    from velora_torch.bench.pretrain.plots import draw

    bench, seeds = finished.bench, sorted({row.seed for row in finished.rows})
    parts = [
        f"# {bench.title}",
        f"{bench.notes} Scale: {finished.scale}; seeds: {len(seeds)}; {len(finished.rows)} of "
        f"{finished.expected} cells are finished. Means over seeds ± their standard error; "
        "differences are paired by seed. Saved activations, gradients and optimizer state are "
        "counted storage by storage in the first step; the peak is the largest moment of a step, "
        "everything in it, as tracked. Rates: the learning rate of embeddings, norms and head, and "
        "that of the blocks' linear layers.",
    ]
    for task in finished.bench.scales[finished.scale].tasks:
        lines = lines_of(finished, task)
        if not lines:
            continue
        own = [row for row in finished.rows if row.task == task]
        parts += [f"## {task}, {own[0].details['tokens']:,} tokens", _table(lines), *_mixed(own)]
        for name, words in draw(lines, task, output).items():
            parts.append(f"![{words}]({name})")
    parts.append(origin(finished.rows, lambda row: row.seconds))
    return "\n\n".join(parts) + "\n"


def _mixed(rows: Sequence[Row]) -> list[str]:
    """A warning where rows of one size have read different text."""
    by_text: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        text = tuple(row.details["text"].values())
        by_text.setdefault(text, []).append(f"{row.variant} (seed {row.seed})")
    if len(by_text) == 1:
        return []
    groups = "; ".join(", ".join(sorted(group)) for group in by_text.values())
    return [
        f"**These rows have read {len(by_text)} different texts, and can only be compared within "
        f"each:** {groups}. Packages of text differ from version to version."
    ]


def _table(lines: Sequence[Line]) -> str:
    header = ["method", "rates", "perplexity", "against full", *CATEGORIES.values(), "peak"]
    header += ["step", "tokens/s", "time"]
    body = []
    for line in lines:
        cells = [
            line.variant.label,
            ", ".join(f"{rate:g}" for rate in line.rates),
            format_estimate(line.perplexity, 1.0, 2),
            _percent(line.relative),
            *(known(line.memory[name], format_bytes) for name in CATEGORIES),
            known(line.peak, format_bytes),
        ]
        if line.seconds is None:
            cells += [MISSING] * 3
        else:
            cells.append(format_seconds(line.seconds))
            cells.append(f"{line.tokens_per_second:,.0f}")
            cells.append(known(line.ratio, format_ratio))
        body.append(cells)
    return markdown_grid(header, body)


def _relative(own: Sequence[Row], base: Sequence[Row]) -> Estimate | None:
    others = {row.seed: row.score for row in base}
    return estimate([row.score / others[row.seed] - 1 for row in own if row.seed in others])


def _mean(rows: Sequence[Row], quantity: Callable[[Row], float | None]) -> float | None:
    known = [n for row in rows if (n := quantity(row)) is not None]
    return statistics.fmean(known) if known else None


def _mean_memory(rows: Sequence[Row], category: str) -> float | None:
    return _mean(rows, lambda row: row.memory.get(category))


def _curve(rows: Sequence[Row]) -> list[tuple[float, float]]:
    at: dict[float, list[float]] = {}
    for row in rows:
        for point in row.details["curve"]:
            if point["perplexity"] is not None:
                at.setdefault(point["tokens"], []).append(point["perplexity"])
    return [(tokens, statistics.fmean(values)) for tokens, values in sorted(at.items())]


def _step_tokens(row: Row) -> int:
    train, length = row.recipe["train"], row.recipe["data"]["max_length"]
    return int(train["batch_size"] * train["accumulation"] * length)


def _percent(gap: Estimate | None) -> str:
    return MISSING if gap is None else f"{format_change(gap)} %"
