"""The table of a bench in Markdown, in the layout of the paper's T1, and its pairs with VeLoRA."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from velora_torch.bench.grid import Bench, Row
from velora_torch.bench.statistics import (
    Estimate,
    average,
    average_over,
    by_variant,
    difference,
    estimate,
    shared_tasks,
    verdict,
)
from velora_torch.bench.timing import StepTime, newest_with
from velora_torch.bench.writing import MISSING, known, markdown_grid, origin
from velora_torch.report.quantities import (
    format_bytes,
    format_count,
    format_ratio,
    format_seconds,
    ratio_of,
)


@dataclass(frozen=True)
class Line:
    """A variant in numbers; None: not measured."""

    variant: str
    label: str
    memory: float | None
    """Bytes of a training step, all categories, mean over the shared tasks."""
    activations: float | None
    """Its saved activations alone."""
    parameters: float | None
    """Trainable ones, mean over the shared tasks."""
    scores: dict[str, Estimate | None]
    average: Estimate | None
    perplexity: Estimate | None
    step: StepTime | None


@dataclass(frozen=True)
class Pair:
    """A variant next to the same method without VeLoRA."""

    label: str
    base: str
    gap: Estimate | None
    """Difference of the averages, paired by task and seed."""
    memory: float | None
    """Ratio of the training steps' bytes."""
    time: float | None
    """Ratio of the training steps' times."""

    @property
    def verdict(self) -> str:
        """Within one standard error or better?"""
        return verdict(self.gap)


@dataclass(frozen=True)
class Summary:
    """All numbers of a bench's table and plot."""

    bench: Bench
    scale: str
    tasks: list[str]
    """Those that any variant has a score of."""
    shared: list[str]
    """Those that all variants have a score of; averages are over these."""
    lines: list[Line]
    pairs: list[Pair]
    rows: list[Row]
    expected: int
    """Cells of the grid."""


def summarise(
    bench: Bench, scale: str, rows: Sequence[Row], times: Sequence[StepTime], expected: int
) -> Summary:
    """Put the numbers of a bench together.

    Args:
        bench: names the variants and their pairs.
        scale: which of its scales.
        rows: one row for each finished cell, all of today's recipes.
        times: times of steps of today's recipes.
        expected: cells of the whole grid.
    """
    scores = by_variant(rows)
    tasks = [t for t in bench.scales[scale].tasks if any(t in own for own in scores.values())]
    shared = shared_tasks(scores, tasks)
    lines = []
    for variant in bench.variants:
        if variant.name not in scores:
            continue
        own = [row for row in rows if row.variant == variant.name]
        done = scores[variant.name]
        lines.append(
            Line(
                variant.name,
                variant.label,
                _mean_over(own, shared, lambda row: row.memory.get("total")),
                _mean_over(own, shared, lambda row: row.memory.get("saved_activations")),
                _mean_over(own, shared, lambda row: row.trainable_parameters),
                {task: estimate(list(done.get(task, {}).values())) for task in tasks},
                average_over(done, shared),
                _perplexity(own, shared),
                newest_with(times, [variant.name]).get(variant.name),
            )
        )
    by_name = {line.variant: line for line in lines}
    pairs = []
    for variant in bench.variants:
        if variant.base is None or not {variant.name, variant.base} <= by_name.keys():
            continue
        own_line, base_line = by_name[variant.name], by_name[variant.base]
        timed = newest_with(times, [variant.name, variant.base])
        pairs.append(
            Pair(
                own_line.label,
                base_line.label,
                difference(scores[variant.name], scores[variant.base], shared),
                ratio_of(own_line.memory, base_line.memory),
                timed[variant.name].median / timed[variant.base].median if timed else None,
            )
        )
    return Summary(bench, scale, tasks, shared, lines, pairs, list(rows), expected)


def markdown(summary: Summary, plot: str | None = None) -> str:
    """The whole table.md.

    Args:
        summary: the numbers.
        plot: file name of the plot to show, if there is one.
    """
    parts = [f"# {summary.bench.title}", _story(summary), _main_table(summary)]
    if summary.pairs:
        parts += ["## With VeLoRA and without", _pairs_story(), _pairs_table(summary)]
    if plot is not None:
        parts += ["## Accuracy against memory", f"![accuracy against memory]({plot})"]
    parts.append(origin(summary.rows, lambda row: row.seconds))
    return "\n\n".join(part for part in parts if part) + "\n"


def format_estimate(value: Estimate | None, factor: float = 100.0, digits: int = 1) -> str:
    """0.912 and 0.004 as "91.2 ± 0.4"; no error where there is one seed."""
    if value is None:
        return MISSING
    shown = f"{factor * value.mean:.{digits}f}"
    return shown if value.error is None else f"{shown} ± {factor * value.error:.{digits}f}"


def format_change(value: Estimate | None, digits: int = 1) -> str:
    """0.012 and 0.004 as "+1.2 ± 0.4": a difference always has its sign."""
    shown = format_estimate(value, digits=digits)
    return f"+{shown}" if value is not None and value.mean >= 0 else shown


def _main_table(summary: Summary) -> str:
    if not summary.lines:
        return "No cell is finished yet."
    perplexity = any(line.perplexity is not None for line in summary.lines)
    timed = any(line.step is not None for line in summary.lines)
    header = ["method", "memory", "of it activations", "trainable"]
    header += ["step"] * timed + summary.tasks + ["average"] + ["perplexity"] * perplexity
    body = []
    for line in summary.lines:
        cells = [
            line.label,
            known(line.memory, format_bytes),
            known(line.activations, format_bytes),
        ]
        cells.append(known(line.parameters, format_count))
        if timed:
            cells.append(_step(line.step))
        cells += [format_estimate(line.scores[task]) for task in summary.tasks]
        cells.append(format_estimate(line.average))
        if perplexity:
            cells.append(format_estimate(line.perplexity, 1.0, 2))
        body.append(cells)
    return markdown_grid(header, body)


def _pairs_table(summary: Summary) -> str:
    header = ["method", "against", "difference", "memory", "step time"]
    header.append("within one standard error or better")
    body = [
        [
            pair.label,
            pair.base,
            format_change(pair.gap, 2),
            known(pair.memory, format_ratio),
            known(pair.time, format_ratio),
            pair.verdict,
        ]
        for pair in summary.pairs
    ]
    return markdown_grid(header, body)


def _story(summary: Summary) -> str:
    seeds = sorted({row.seed for row in summary.rows})
    lines = [
        summary.bench.notes,
        f"Scale: {summary.scale}; seeds: {len(seeds)}; {len(summary.rows)} of {summary.expected} "
        "cells are finished. Means over seeds ± their standard error. Memory is what the first "
        "training step holds, counted storage by storage: weights, saved activations, gradients, "
        "optimizer state.",
    ]
    left_out = [task for task in summary.tasks if task not in summary.shared]
    if left_out and summary.shared:
        lines.append(
            "Averages, memory and parameters are over the tasks that all rows have: "
            f"{', '.join(summary.shared)}; left out: {', '.join(left_out)}."
        )
    elif left_out:
        lines.append("No task has been run with all methods of the table yet: no averages.")
    return "\n".join(line for line in lines if line)


def _pairs_story() -> str:
    return (
        "The difference of the averages in points, paired by task and seed, ± its standard error "
        "over seeds; memory and time as ratios."
    )


def _mean_over(
    rows: Sequence[Row], tasks: Sequence[str], quantity: Callable[[Row], float | None]
) -> float | None:
    """Mean over tasks of the mean over seeds; None where a task lacks the number."""
    means = []
    for task in tasks:
        known = [n for row in rows if row.task == task and (n := quantity(row)) is not None]
        if not known:
            return None
        means.append(statistics.fmean(known))
    return statistics.fmean(means) if means else None


def _perplexity(rows: Sequence[Row], tasks: Sequence[str]) -> Estimate | None:
    by_task = [
        [row.perplexity for row in rows if row.task == task and row.perplexity is not None]
        for task in tasks
    ]
    return average([estimate(values) for values in by_task])


def _step(step: StepTime | None) -> str:
    return MISSING if step is None else format_seconds(step.median)
