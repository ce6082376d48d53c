"""How far a bench is, and how long the rest will take."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from velora_torch.bench.grid import Cell, Row
from velora_torch.report.quantities import format_seconds


def seconds_left(rows: Iterable[Row], open_cells: Iterable[Cell], jobs: int = 1) -> float | None:
    """Estimate the time for the cells that are left from the mean time of each variant.

    Args:
        rows: finished cells; a variant without any counts as the mean of all others.
        open_cells: what is left.
        jobs: cells that run at the same time.

    Returns:
        Seconds, or ``None`` before anything has been measured.
    """
    taken: dict[str, list[float]] = {}
    for row in rows:
        taken.setdefault(row.variant, []).append(row.seconds)
    if not taken:
        return None
    means = {variant: statistics.fmean(seconds) for variant, seconds in taken.items()}
    usual = statistics.fmean(means.values())
    return sum(means.get(cell.variant, usual) for cell in open_cells) / jobs


def cell_line(number: int, total: int, row: Row, elapsed: float, left: float | None) -> str:
    """One finished cell: "cell 17/144: trec, lora, seed 0: accuracy 0.912, 41.0 s; ..."."""
    score = f"{row.metric} {row.score:.3f}"
    if row.perplexity is not None:
        score += f", perplexity {row.perplexity:.2f}"
    return (
        f"cell {number}/{total}: {row.task}, {row.variant}, seed {row.seed}: {score}, "
        f"{format_seconds(row.seconds)}; elapsed {format_seconds(elapsed)}, "
        f"left {format_seconds(left)}"
    )
