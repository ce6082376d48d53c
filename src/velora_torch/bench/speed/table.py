"""table.md: goals, models, layers, the parts of a layer's step, and what was timed before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from velora_torch.bench.interleave import Spread
from velora_torch.bench.speed.cases import Case
from velora_torch.bench.speed.goals import GOALS, Goal
from velora_torch.bench.speed.rows import SpeedRow, against, current, flops_against
from velora_torch.bench.speed.variants import BESIDE, PARTS, Part, variants_of
from velora_torch.bench.timing import newest_with
from velora_torch.bench.writing import MISSING, known, markdown_grid, origin
from velora_torch.report.quantities import format_bytes, format_ratio, format_seconds

Found = Mapping[str, list[SpeedRow]]
"""Current rows by case, cases in their order."""

STORY = (
    "A step is forward and backward pass, fused AdamW and `zero_grad`, always on the same batch; "
    "weights, activations and optimizer states have the type of the case, coefficients float32. "
    "All variants of a case take turns, and another one is the first in each round. A time is the "
    "median over the rounds (fastest to slowest), a ratio the median over the rounds of the ratio "
    "to the case's first variant, or to another one, in the same round (its quartiles). FLOPs are "
    "those of matrix products, convolutions and attention; those of a second, of the median time. "
    "Saved activations are what autograd keeps for the backward pass."
)


def found_rows(rows: Sequence[SpeedRow], cases: Sequence[Case]) -> dict[str, list[SpeedRow]]:
    """Today's rows of the cases that have any."""
    by_case = {case.name: current(rows, case) for case in cases}
    return {name: own for name, own in by_case.items() if own}


def newest(rows: Sequence[SpeedRow]) -> dict[str, SpeedRow]:
    """The newest row of each variant of a case."""
    return {row.variant: row for row in sorted(rows, key=lambda row: row.session)}


def markdown(found: Found, cases: Sequence[Case], plot: str | None = None) -> str:
    """The whole table.md.

    Args:
        found: what :func:`found_rows` gives.
        cases: all cases.
        plot: file name of the plot to show, if there is one.
    """
    own = [case for case in cases if case.name in found]
    rows = [row for case in own for row in newest(found[case.name]).values()]
    parts = ["# How long a training step takes", STORY]
    parts += _goals(found)
    if plot is not None:
        parts += [f"![time of a step over the first variant's]({plot})"]
    for case in own:
        if case.level == "model":
            parts += [f"## {case.name}: {case.about}", _model_table(case, found[case.name])]
    for title, layers in _layers(own):
        newest_of = [(case.about, newest(found[case.name])) for case in layers]
        parts += [f"## {title}", LAYER_STORY, _layer_table(layers[0], newest_of)]
    split = [case for case in own if case.level == "parts"]
    if split:
        parts += ["## Where the time of a layer goes", PARTS_STORY, _parts_table(split, found)]
    parts += _before(own, found)
    parts.append(origin(rows, lambda row: sum(row.seconds)))
    return "\n\n".join(part for part in parts if part) + "\n"


def format_spread(ratio: Spread) -> str:
    """A ratio and its quartiles: "0.77× (0.76 to 0.78)"."""
    low, high = ratio.lower_quartile, ratio.upper_quartile
    return f"{format_ratio(ratio.median)} ({low:.2f} to {high:.2f})"


def _goals(found: Found) -> list[str]:
    body = []
    for goal in GOALS:
        measured = goal.measured(found)
        if measured is not None:
            verdict = "yes" if goal.is_met(measured) else "no"
            shown = [format_ratio(goal.most), format_spread(measured), verdict]
            flops = flops_against(found[goal.case], goal.variant, goal.base)
            body.append([str(goal), *shown, known(flops, format_ratio)])
    if not body:
        return []
    table = markdown_grid(["time of a step", "at most", "measured", "met", "FLOPs"], body)
    return ["## Goals", "Meant for two CPU cores, and bfloat16.", table]


def _model_table(case: Case, rows: Sequence[SpeedRow]) -> str:
    by_variant = newest(rows)
    labels = {variant.name: variant.label for variant in variants_of(case)}
    first = variants_of(case)[0]
    header = ["variant", "step", "fastest to slowest", f"over {first.label}", "quartiles"]
    header += ["over others (quartiles)", "FLOPs", f"over {first.label}", "in a second"]
    header += ["saved activations"]
    body = []
    for variant in variants_of(case):
        row = by_variant.get(variant.name)
        if row is not None:
            body.append(
                [
                    variant.label,
                    format_seconds(row.median),
                    f"{format_seconds(row.low)} to {format_seconds(row.high)}",
                    format_ratio(row.ratio),
                    f"{row.ratio_lower:.2f} to {row.ratio_upper:.2f}",
                    _beside(variant.name, labels, rows),
                    format_flops(row.flops),
                    format_ratio(row.flops_ratio),
                    _rate(row),
                    known(row.saved_activations, format_bytes),
                ]
            )
    return markdown_grid(header, body)


def _beside(variant: str, labels: Mapping[str, str], rows: Sequence[SpeedRow]) -> str:
    """Time over that of each one that a variant is compared with besides the first."""
    measured = {other: against(rows, variant, other) for other in BESIDE.get(variant, ())}
    return "; ".join(
        f"{format_spread(ratio)} over {labels[other]}"
        for other, ratio in measured.items()
        if ratio is not None
    )


def _layers(cases: Sequence[Case]) -> Iterator[tuple[str, list[Case]]]:
    """Single layers, those that are trained in one way after the others, with a title."""
    for method, title in (("full", "Single layers"), ("lora", "Single layers with LoRA")):
        layers = [case for case in cases if (case.level, case.method) == ("layer", method)]
        if layers:
            yield title, layers


LAYER_STORY = (
    "Median time of the first variant and its FLOPs in a second; for the others the ratio of the "
    "times, and behind the stroke that of the FLOPs."
)


def _layer_table(case: Case, lines: Sequence[tuple[str, Mapping[str, SpeedRow]]]) -> str:
    """A line for each layer.

    Args:
        case: one of them; they have the same variants.
        lines: what is said of it, and its row of each variant.
    """
    first, *others = [
        variant for variant in variants_of(case) if any(variant.name in rows for _, rows in lines)
    ]
    body = []
    for about, rows in lines:
        base = rows[first.name]
        line = [about, f"{format_seconds(base.median)}, {_rate(base)}/s"]
        for variant in others:
            row = rows.get(variant.name)
            shown = MISSING
            if row is not None:
                shown = f"{format_ratio(row.ratio)} / {format_ratio(row.flops_ratio)}"
            line.append(shown)
        body.append(line)
    return markdown_grid(["layer", first.label, *(variant.label for variant in others)], body)


PARTS_STORY = (
    "Each part is timed by itself, in turn with the whole step: its median, and its share of the "
    "whole step of the compressed layer; of a product, its FLOPs in a second of that time. What is "
    "left of the step is autograd's and the hooks'."
)


def _parts_table(cases: Sequence[Case], found: Found) -> str:
    by_case = {case.name: newest(found[case.name]) for case in cases}
    body = []
    for part in PARTS:
        line = [f"{part.label} ({part.when})" if part.when else part.label]
        for case in cases:
            row = by_case[case.name].get(part.name)
            line.append(MISSING if row is None else _part(row))
        body.append(line)
        if part is _LAST_OWN:
            rest = [_rest(found[case.name]) for case in cases]
            body.append(["rest of the compressed layer's step", *rest])
    return markdown_grid(["part", *(case.about for case in cases)], body)


_LAST_OWN: Part = [part for part in PARTS if part.side == "ours"][-1]


def _rest(rows: Sequence[SpeedRow]) -> str:
    """What the parts leave of the compressed layer's step, in the newest session that has all."""
    parts = [part.name for part in PARTS if part.side == "ours"]
    session = newest_with(rows, parts)
    if not session:
        return MISSING
    whole, *inside = [session[name].median for name in parts]
    rest = whole - sum(inside)
    shown = _share(abs(rest), abs(rest) / whole)
    return f"less than none: {shown}" if rest < 0 else shown


BEFORE_STORY = (
    "What the same cases took in each session, with the FLOPs of the first variant in a second: "
    "a machine's rate may differ from day to day, and what we compute may have become faster."
)


def _before(cases: Sequence[Case], found: Found) -> list[str]:
    """Of goals, models and layers that were timed in more than one session."""
    parts = _goals_before(found)
    for case in cases:
        sessions = _sessions(found[case.name])
        if case.level == "model" and len(sessions) > 1:
            parts += [f"### {case.name}", _sessions_table(case, sessions)]
    for title, layers in _layers(cases):
        lines = [
            (f"{case.about}, {day[:10]}", rows)
            for case in layers
            for day, rows in list(_sessions(found[case.name]).items())[1:]
        ]
        if lines:
            parts += [f"### {title}, earlier", _layer_table(layers[0], lines)]
    return ["## Timed more than once", BEFORE_STORY, *parts] if parts else []


def _goals_before(found: Found) -> list[str]:
    """What was measured of each goal on each day, and how many were met."""
    by_day: dict[str, dict[str, list[SpeedRow]]] = {}
    for case, rows in found.items():
        for row in rows:
            by_day.setdefault(row.session[:10], {}).setdefault(case, []).append(row)
    measured = {
        day: {goal: ratio for goal in GOALS if (ratio := goal.measured(by_day[day]))}
        for day in sorted(by_day, reverse=True)
    }
    days = [day for day, of in measured.items() if of]
    if len(days) < 2:
        return []
    body = [
        [str(goal), format_ratio(goal.most), *(_verdict(goal, measured[day]) for day in days)]
        for goal in GOALS
        if any(goal in measured[day] for day in days)
    ]
    met = [
        f"{sum(goal.is_met(ratio) for goal, ratio in measured[day].items())} of "
        f"{len(measured[day])}"
        for day in days
    ]
    header = ["time of a step (bold: met)", "at most", *days]
    return ["### Goals, day by day", markdown_grid(header, [*body, ["met", "", *met]])]


def _verdict(goal: Goal, measured: Mapping[Goal, Spread]) -> str:
    if goal not in measured:
        return MISSING
    shown = format_ratio(measured[goal].median)
    return f"**{shown}**" if goal.is_met(measured[goal]) else shown


def _sessions(rows: Sequence[SpeedRow]) -> dict[str, dict[str, SpeedRow]]:
    """The row of each variant by session, the newest first."""
    days = sorted({row.session for row in rows}, reverse=True)
    return {day: {row.variant: row for row in rows if row.session == day} for day in days}


def _sessions_table(case: Case, sessions: Mapping[str, Mapping[str, SpeedRow]]) -> str:
    """A line for each two variants that are compared, a column for each session."""
    labels = {variant.name: variant.label for variant in variants_of(case)}
    first, *others = labels
    pairs = [(variant, first) for variant in others]
    pairs += [(variant, other) for variant in others for other in BESIDE.get(variant, ())]
    header = ["time of a step"]
    for day, rows in sessions.items():
        header.append(f"{day[:10]}, {_rate(rows[first])}/s")
    body = []
    for variant, base in pairs:
        measured = [against([*rows.values()], variant, base) for rows in sessions.values()]
        if any(measured):
            shown = [format_spread(ratio) if ratio else MISSING for ratio in measured]
            body.append([f"{labels[variant]} / {labels[base]}", *shown])
    return markdown_grid(header, body)


def _part(row: SpeedRow) -> str:
    shown = _share(row.median, row.ratio)
    return f"{shown}, {_rate(row)}/s" if row.flops else shown


def _share(seconds: float, share: float) -> str:
    return f"{format_seconds(seconds)}, {100 * share:.1f}%"


def _rate(row: SpeedRow) -> str:
    """FLOPs in a second of the median time."""
    return format_flops(row.flops / row.median)


def format_flops(flops: float) -> str:
    """2.5e11 -> "250 G", 1.2e12 -> "1.20 T"."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops >= size:
            value = flops / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{flops:.0f}"
