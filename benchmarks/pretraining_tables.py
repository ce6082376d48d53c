"""The tables of pre-training: its pages in docs/results, and the analysis' ablations.

`result_tables.py` puts them into their pages.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

import choose_rates
from result_rows import SCALE, finished
from velora_torch.bench.catalogue import BENCHES
from velora_torch.bench.grid import Finished, Row
from velora_torch.bench.pretrain.protocol import LOCAL_RATES, REST, Rates
from velora_torch.bench.pretrain.table import CATEGORIES, Line, lines_of
from velora_torch.bench.statistics import by_variant, estimate
from velora_torch.bench.table import format_change, format_estimate
from velora_torch.bench.writing import known, markdown_grid
from velora_torch.report.quantities import format_bytes, format_ratio, format_seconds

_PROJECTED = ("galore", "apollo", "flora")
_ALL = ("full", "velora-all", *_PROJECTED)
_BESIDE_RELORA = ("full", "lora", "galore", "velora-not-qk", "velora-all-m4")
_LEAST = (
    ("full-8bit-gc-chunked", ("full", "full-8bit")),
    ("velora-value-down-8bit-gc-chunked", ("full-8bit-gc-chunked", "velora-value-down-8bit")),
    ("velora-all-m4-8bit-gc-chunked", ("full-8bit-gc-chunked", "velora-all-m4-8bit")),
)
"""Variants with the smallest peaks, and what they are compared with."""
PAIRED = (
    ("local", "llama-3m", "velora-value-down", ("full", "lora")),
    ("local", "llama-3m", "relora", _BESIDE_RELORA),
    ("local", "llama-3m", "velora-value-down-apollo", ("full", "apollo", "velora-value-down")),
    (
        *("local", "llama-3m", "velora-value-down-8bit"),
        ("full", "full-8bit", "velora-value-down", "lora", "galore"),
    ),
    ("local", "llama-3m", "velora-not-qk", ("full", *_PROJECTED)),
    ("local", "llama-3m", "velora-all", ("full", "galore-twelfth", "apollo", "flora")),
    ("local", "llama-3m", "velora-all-fixed", (*_ALL, "galore-twelfth")),
    ("local", "llama-3m", "velora-all-m4", ("full", "velora-all")),
    ("local", "llama-3m", "velora-all-m4-8bit", ("full", "velora-all-m4", *_PROJECTED)),
    ("local", "llama-3m", "velora-value-down-redrawn", ("full", "velora-value-down")),
    (
        *("local", "llama-3m", "velora-value-down-redrawn-8bit"),
        ("full", "full-8bit", "velora-value-down-redrawn", "velora-value-down-8bit"),
    ),
    ("local", "llama-3m", "lora-velora", ("full", "lora", "velora-not-qk", "velora-all-m4")),
    ("local", "llama-3m", "galore", ("full", "galore-packaged", "apollo")),
    ("local", "llama-3m", "galore-twelfth", ("full", "galore-twelfth-packaged")),
    ("local", "llama-15m", "velora-value-down", ("full", "galore")),
    (
        *("local", "llama-15m", "velora-value-down-redrawn"),
        ("full", "velora-value-down", "velora-value-down-8bit", "velora-not-qk", "galore", "lora"),
    ),
    (
        *("local", "llama-15m", "velora-value-down-8bit"),
        ("full", "full-8bit", "velora-value-down", "lora", "galore", "velora-not-qk"),
    ),
    ("local", "llama-15m", "relora", _BESIDE_RELORA),
    ("local", "llama-15m", "velora-not-qk", ("full", "lora", *_PROJECTED)),
    ("local", "llama-15m", "velora-all", ("full", "galore-twelfth", *_PROJECTED)),
    ("local", "llama-15m", "velora-all-fixed", (*_ALL, "galore-twelfth")),
    ("local", "llama-15m", "velora-all-m4", ("full", "velora-all", *_PROJECTED)),
    (
        *("local", "llama-15m", "velora-all-m4-8bit"),
        ("full", "full-8bit", "velora-all-m4", "velora-all", *_PROJECTED),
    ),
    ("local", "llama-15m", "velora-all-m16", ("full", "velora-all", "galore-twelfth")),
    ("local", "llama-15m", "velora-all-m32", ("full", "velora-all-m16", "galore-twelfth")),
    ("local", "llama-15m", "velora-paper", ("full", "velora-value-down")),
    ("local", "llama-15m", "full-8bit", ("full", "galore", "velora-not-qk")),
    ("local", "llama-15m", "galore", ("full", "galore-packaged", "apollo")),
    ("local", "llama-15m", "galore-twelfth", ("full", "galore-twelfth-packaged")),
    *(("local", task, *of) for task in ("llama-3m", "llama-15m") for of in _LEAST),
    ("long", "llama-3m", "velora-value-down", ("full", "lora", "apollo")),
    (
        *("long", "llama-3m", "velora-value-down-redrawn"),
        ("full", "velora-value-down", "velora-value-down-rarely", "full-8bit", "apollo", "lora"),
    ),
    ("long", "llama-3m", "velora-value-down-rarely", ("full",)),
    (
        *("long", "llama-3m", "velora-value-down-8bit"),
        ("full", "full-8bit", "velora-value-down", "lora", "apollo", "velora-all-m4-8bit"),
    ),
    ("long", "llama-3m", "relora", ("full", "lora", "galore", "velora-all-m4")),
    ("long", "llama-3m", "velora-not-qk", ("full", "lora", "galore")),
    ("long", "llama-3m", "velora-all", ("full", "galore-twelfth", "flora")),
    (
        *("long", "llama-3m", "velora-all-m4"),
        ("full", "velora-all", "galore", "apollo", "flora", "velora-not-qk", "lora"),
    ),
    (
        *("long", "llama-3m", "velora-all-m4-8bit"),
        ("full", "full-8bit", "velora-all-m4", "velora-all", "velora-not-qk", "lora", *_PROJECTED),
    ),
    ("long", "llama-3m", "full-8bit", ("full", "apollo", "velora-value-down")),
    ("long", "llama-3m", "lora", ("full",)),
    ("long", "llama-3m", "apollo", ("full",)),
    ("long", "llama-3m", "flora", ("full",)),
    ("long", "llama-3m", "galore", ("full", "galore-packaged", "flora")),
    ("long", "llama-3m", "galore-twelfth", ("full", "galore-twelfth-packaged")),
    ("long", "llama-3m", "velora-all-fixed", ("full", "velora-all", "flora")),
    ("long", "llama-3m", "velora-all-often", ("velora-all", "velora-all-fixed")),
    ("long", "llama-15m", "velora-value-down-redrawn", ("full",)),
)
"""Scale, task, variant, and the variants that the pages of pre-training compare it with."""
PAIRED_VECTORS = (
    ("local", "llama-3m", "velora-value-down-signs", ("full", "velora-value-down")),
    ("local", "llama-3m", "velora-not-qk-average", ("full", "velora-not-qk")),
    ("local", "llama-3m", "velora-qk", ("full",)),
    ("local", "llama-3m", "velora-qk-faster", ("full", "velora-qk")),
    ("local", "llama-3m", "velora-all-gaussian", ("full", "velora-all")),
    ("local", "llama-3m", "velora-all-average", ("full", "velora-all-fixed")),
    ("local", "llama-3m", "velora-all-each-step", ("full", "velora-all", "velora-all-fixed")),
    ("local", "llama-3m", "apollo-eps", ("full", "apollo")),
)
"""The same for the page of the analysis."""
PRE_TRAINING_ROWS = {SCALE: "pretrain", "long": "pretrain-long"}
"""Folders by scale."""
VECTOR_ROWS = "pretrain-ablations"
"""The folder of the local scale's rows that only the analysis compares."""


def pre_trained(task: str, scale: str = SCALE) -> str:
    """All methods on one model, with what a step holds; of a longer scale, with tokens to match."""
    own, body = finished("pretrain", scale, PRE_TRAINING_ROWS[scale]), []
    lines = lines_of(own, task)
    timed = lines[0].seconds is not None
    tokens = _tokens_to_match(own.rows, task) if scale != SCALE else None
    for line in lines:
        sizes = (*line.memory.values(), line.peak)
        cells = [
            line.variant.label,
            str(sum(row.task == task and row.variant == line.variant.name for row in own.rows)),
            format_estimate(line.perplexity, 1.0),
            "" if line.relative is None else format_change(line.relative),
            *(known(size, format_bytes) for size in sizes),
        ]
        if tokens is not None:
            assert line.perplexity is not None
            needed = tokens(line.perplexity.mean)
            over = own.rows[0].details["tokens"] / needed
            cells.insert(4, f"{needed / 1e6:.1f}M, {format_ratio(over)}")
        body.append([*cells, step(line)] if timed else cells)
    header = ["method", "seeds", "perplexity", "% against full"]
    header += ["full training needs, tokens over that"] if tokens else []
    header += CATEGORIES.values()
    header += ["peak of a step", *(["step"] if timed else [])]
    return markdown_grid(header, body)


def _tokens_to_match(longer: Sequence[Row], task: str) -> Callable[[float], float]:
    """Returns a function from a perplexity to the tokens after which full training ends there.

    A power law through full training's two ends, at the local scale and at a longer one: means
    over the seeds that both have, each the end of a whole schedule.
    """
    rows = [
        {row.seed: row for row in of if (row.task, row.variant) == (task, "full")}
        for of in (finished("pretrain").rows, longer)
    ]
    seeds = sorted(rows[0].keys() & rows[1].keys())
    few, many = (of[seeds[0]].details["tokens"] for of in rows)
    high, low = (statistics.fmean(of[seed].score for seed in seeds) for of in rows)
    exponent = math.log(high / low) / math.log(many / few)
    return lambda perplexity: many * (low / perplexity) ** (1 / exponent)


def rates() -> str:
    """What the sweeps of learning rates have found: the bench's own rates are bold."""
    own, body = BENCHES["pretrain"], []
    columns = {
        f"{task}{words}": swept
        for bench, words in (("pretrain", ""), ("pretrain-long", ", four times the tokens"))
        for task in choose_rates.TASKS[bench]
        if (swept := _swept(bench, task, LOCAL_RATES[task]))
    }
    for variant in choose_rates.SMALL | choose_rates.LARGER:
        tried = [column.get(variant, "") for column in columns.values()]
        body.append([own.variant(variant).label, *tried])
    return markdown_grid(["method", *columns], body, words=tuple(columns))


def _swept(bench: str, task: str, chosen: Mapping[str, Rates]) -> dict[str, str]:
    """By variant: rates of the linear layers and perplexities, those of the bench's rate of the
    rest."""
    found: dict[str, list[tuple[float, list[float]]]] = {}
    for (at, variant, rest, linear), of in choose_rates.scores_of(bench).items():
        if (at, rest) == (task, REST) and linear is not None:
            found.setdefault(variant, []).append((linear, of))
    return {variant: _tried(sorted(of), chosen[variant].linear) for variant, of in found.items()}


def _tried(found: Sequence[tuple[float, list[float]]], chosen: float | None) -> str:
    shown = []
    for linear, of in found:
        score = f"{statistics.mean(of):.1f}" + ("†" if len(of) > 1 else "")
        shown.append(f"**{score}**" if linear == chosen else score)
    return f"{', '.join(_short(linear) for linear, _ in found)}: {', '.join(shown)}"


def _short(rate: float) -> str:
    """1.25e-4."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def course(task: str, scale: str) -> str:
    """Perplexity of full training while it trains, and how far the others are from it, in %."""
    own = finished("pretrain", scale, PRE_TRAINING_ROWS[scale])
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for row in own.rows:
        if row.task == task:
            curve = {at["tokens"]: at["perplexity"] for at in row.details["curve"]}
            curves.setdefault(row.variant, {})[row.seed] = curve
    full = curves["full"]
    moments, body = list(full[0]), []
    for variant in own.bench.variants:
        mine = curves.get(variant.name, {})
        if seeds := sorted(mine.keys() & full.keys()):
            if variant.name == "full":
                means = [estimate([full[seed][at] for seed in seeds]) for at in moments]
                cells = [format_estimate(mean, 1.0) for mean in means]
            else:
                gaps = [[mine[seed][at] / full[seed][at] - 1 for seed in seeds] for at in moments]
                cells = [format_change(estimate(gap)) for gap in gaps]
            body.append([variant.label, str(len(seeds)), *cells])
    header = ["method", "seeds", *(f"{at / 1e6:.1f}M" for at in moments)]
    return markdown_grid(header, body)


FEWEST = 5
"""Methods whose order is worth a line."""
Ends = Mapping[str, float]
"""Variant -> perplexity at the end."""


def order() -> str:
    """How many pairs of methods end in the same order with another seed, model or length."""
    body = []
    for name, one, other in _compared():
        methods, turned = one.keys() & other.keys(), turned_pairs(one, other)
        if len(methods) < FEWEST:
            continue
        kept = 1 - len(turned) / math.comb(len(methods), 2)
        ratios = [max(one[a], one[b]) / min(one[a], one[b]) for a, b in turned]
        apart = known(max(ratios, default=None), lambda ratio: f"{ratio - 1:.1%}")
        body.append([name, str(len(methods)), f"{kept:.0%}", apart])
    last = "furthest apart of the others, at first"
    return markdown_grid(["orders of", "methods", "pairs in one order", last], body)


def turned_pairs(first: Ends, second: Ends) -> list[tuple[str, str]]:
    """Pairs of methods that do not stand in one order in both.

    Only methods in both count; equal scores have no order, and their pair has turned. Where a
    share t of all pairs has, Kendall's tau is 1 - 2t.
    """
    pairs = combinations(sorted(first.keys() & second.keys()), 2)
    return [(a, b) for a, b in pairs if (first[a] - first[b]) * (second[a] - second[b]) <= 0]


def _compared() -> Iterator[tuple[str, Ends, Ends]]:
    """Two seeds of one training; one seed of two that differ in model or length; and of two lengths
    without APOLLO."""
    names, ends = {}, {}
    for own in (finished("pretrain", *of) for of in PRE_TRAINING_ROWS.items()):
        for task in tasks_of(own):
            names[task, own.scale] = f"{task}, {millions(own.rows, task)}"
            ends[task, own.scale] = _by_seed(own.rows, task)
    for at, of in ends.items():
        for one, other in combinations(sorted(of), 2):
            yield f"{names[at]}: seeds {one + 1} and {other + 1}", of[one], of[other]
    pairs = list(combinations(ends, 2))
    lengths = [(first, second) for first, second in pairs if first[0] == second[0]]
    models = [(first, second) for first, second in pairs if first[1] == second[1]]
    seeds = {
        (first, second): [
            (f"{names[first]}, and {names[second]}: seed {seed + 1}", ends[first][seed], its)
            for seed, its in sorted(ends[second].items())
            if seed in ends[first]
        ]
        for first, second in models + lengths
    }
    for same_seed in seeds.values():
        yield from same_seed
    for pair in lengths:
        for name, few, many in seeds[pair]:
            if "apollo" in few.keys() & many.keys():
                rest = {variant: end for variant, end in few.items() if variant != "apollo"}
                yield f"{name}, without APOLLO", rest, many


def _by_seed(rows: Sequence[Row], task: str) -> dict[int, dict[str, float]]:
    """Seed -> variant -> perplexity; of methods that differ by more than what they recompute."""
    found: dict[int, dict[str, float]] = {}
    for variant, scores in by_variant(rows).items():
        if "gc" not in variant.split("-"):
            for seed, score in scores.get(task, {}).items():
                found.setdefault(seed, {})[variant] = score
    return found


Pairs = tuple[tuple[str, str, str, tuple[str, ...]], ...]


def paired(pairs: Pairs) -> str:
    """Perplexity of a method over another's, less 1, in per cent: paired by seed, and each seed."""
    bench, body = BENCHES["pretrain"], []
    rows = {
        scale: list(finished("pretrain", scale, folder).rows)
        for scale, folder in PRE_TRAINING_ROWS.items()
    }
    rows[SCALE] += finished("pretrain", folder=VECTOR_ROWS).rows
    scores = {scale: by_variant(own) for scale, own in rows.items()}
    for scale, task, variant, others in pairs:
        for other in others:
            mine, its = scores[scale][variant][task], scores[scale][other][task]
            ratios = [mine[seed] / its[seed] - 1 for seed in sorted(mine.keys() & its.keys())]
            labels = [bench.variant(name).label for name in (variant, other)]
            each = ", ".join(f"{100 * ratio:+.1f}" for ratio in ratios)
            model = f"{task}, {millions(rows[scale], task)}"
            body.append([model, *labels, format_change(estimate(ratios)), each])
    header = ["model", "method", "compared with", "%", "each seed"]
    return markdown_grid(header, body, words=header[1:3])


def tasks_of(own: Finished) -> list[str]:
    """The models of a scale that have rows."""
    trained = {row.task for row in own.rows}
    return [task for task in own.bench.scales[own.scale].tasks if task in trained]


def millions(rows: Sequence[Row], task: str) -> str:
    """The tokens that a size is trained on."""
    tokens = next(row.details["tokens"] for row in rows if row.task == task)
    return f"{tokens / 1e6:.1f}M tokens"


def step(line: Line) -> str:
    """Full training's time; another method's, over that."""
    if line.variant.base is None:
        return known(line.seconds, format_seconds)
    return known(line.ratio, format_ratio)
