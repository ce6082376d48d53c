"""What a folder of results holds of a bench: rows and times of today's recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from velora_torch.bench import timing
from velora_torch.bench.grid import Bench, Cell, Finished, cells, newest
from velora_torch.bench.runner import read_rows

ROWS, TIMES = "rows.jsonl", "times.jsonl"


def collect(
    bench: Bench, scale: str, output: Path, grid: Sequence[Cell] = ()
) -> tuple[Finished, int]:
    """Read what is finished, whichever call has run it.

    Args:
        bench: whose results.
        scale: which of its scales.
        output: the folder with rows.jsonl and times.jsonl; either may be missing.
        grid: cells that are meant to be there, finished or not.

    Returns:
        The rows and times, and how many rows have been left out because their recipe has changed.

    Raises:
        ValueError: a line is not a row or a time.
    """
    rows = read_rows(output / ROWS)
    own = [row for row in rows if (row.bench, row.scale) == (bench.name, scale)]
    seeds = 1 + max([cell.seed for cell in grid] + [row.seed for row in own], default=0)
    variants = [variant.name for variant in bench.variants]
    whole = cells(bench, scale, bench.scales[scale].tasks, variants, seeds)
    found, stale = newest(own, whole)
    times = timing.current(timing.read_times(output / TIMES), whole)
    kept = list(found.values())
    expected = len({cell.place for cell in grid} | {row.place for row in kept})
    return Finished(bench, scale, kept, times, expected), len(stale)
