"""What `velora bench` does: check everything, run what is open, time, write table and plot."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from velora_torch.atomic import write_whole
from velora_torch.bench import cell as cell_room
from velora_torch.bench import timing
from velora_torch.bench.catalogue import BENCHES
from velora_torch.bench.collect import ROWS, TIMES, collect
from velora_torch.bench.grid import Bench, Cell, Finished, cells, changes, newest
from velora_torch.bench.preflight import check_grid
from velora_torch.bench.request import (
    JOBS,
    SEEDS,
    SPEED,
    BenchError,
    Request,
    check_options,
    chosen_names,
    unknown,
)
from velora_torch.bench.runner import FAILURES, RunCell, Runner, read_rows
from velora_torch.bench.table import markdown, summarise
from velora_torch.lock import alone

Say = Callable[[str], None]
TABLE, PLOT = "table.md", "accuracy_memory"


def bench(
    request: Request,
    say: Say,
    run_cell: RunCell | None = None,
    make_step: Callable[[Cell], timing.Step] = timing.make_step,
) -> int:
    """Run a bench, or go on with it.

    Args:
        request: what to run.
        say: shows a line.
        run_cell: runs one cell; None trains it.
        make_step: builds what is timed.

    Returns:
        0, or 1 where cells or the timing have failed.

    Raises:
        BenchError: unknown names, missing packages or data; nothing has been run.
        KeyboardInterrupt: Ctrl-C; finished cells are kept, and the table shows them.
    """
    if request.name == SPEED:
        from velora_torch.bench.speed.command import speed

        return speed(request, say)
    chosen = select(request)
    output, seeds = request.folder, request.seeds or SEEDS
    grid = cells(chosen.bench, request.scale, chosen.tasks, chosen.variants, seeds)
    if request.list_only:
        _list(grid, output / ROWS, say)
        return 0
    if request.table_only:
        return _write_table(chosen.bench, request.scale, grid, output, say)
    if run_cell is None:
        check_grid(chosen.bench.scales[request.scale], grid)
    with (
        alone(output, "velora bench", "--output"),
        tempfile.TemporaryDirectory(dir=output, prefix=".scratch-") as scratch,
    ):
        if run_cell is None:
            run_cell = partial(
                cell_room.run_cell, command=request.command, scratch=Path(scratch).resolve()
            )
        runner = Runner(output / ROWS, run_cell, say, request.jobs or JOBS)
        _say_stale(runner, grid, say)
        try:
            outcome = runner.run(grid, request.limit)
            failed = bool(outcome.failed)
            if not request.no_time and not outcome.left:
                failed |= not _time(request, chosen, grid, output, make_step, say)
        except KeyboardInterrupt:
            say("interrupted: finished cells are kept; the same command goes on")
            _write_table(chosen.bench, request.scale, grid, output, say)
            raise
    for cell, reason in outcome.failed.items():
        say(f"failed: {cell}: {reason}")
    if outcome.left:
        say(f"{outcome.left} cells are left; the same command goes on")
    _write_table(chosen.bench, request.scale, grid, output, say)
    return int(failed)


@dataclass
class Selected:
    """Names that exist, in the bench's own order."""

    bench: Bench
    tasks: list[str]
    variants: list[str]


def select(request: Request) -> Selected:
    """Look up what a request names.

    Raises:
        BenchError: something has another name; near misses are named.
    """
    found = BENCHES.get(request.name)
    if found is None:
        raise BenchError(unknown("bench", request.name, [*BENCHES, SPEED]))
    if request.scale not in found.scales:
        raise BenchError(unknown("scale", request.scale, list(found.scales)))
    check_options(request)
    tasks = chosen_names("task", request.tasks, list(found.scales[request.scale].tasks))
    variants = chosen_names("variant", request.variants, [v.name for v in found.variants])
    return Selected(found, tasks, variants)


def _say_stale(runner: Runner, grid: Sequence[Cell], say: Say) -> None:
    """Tell which settings differ in rows that will be run again: the first few."""
    _, stale = runner.finished(grid)
    by_place = {cell.place: cell for cell in grid}
    for row in stale[:3]:
        cell = by_place[row.place]
        differences = list(changes(row, cell))
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        say(f"stale: {cell}: {'; '.join(differences[:4])}{more}")
    if len(stale) > 3:
        say(f"stale: {len(stale) - 3} more")


def _list(grid: Sequence[Cell], path: Path, say: Say) -> None:
    """Show every cell and its state."""
    found, stale = newest(read_rows(path), grid)
    places = {row.place for row in stale}
    for number, cell in enumerate(grid, 1):
        state = "open"
        if cell in found:
            state = f"finished, {found[cell].metric} {found[cell].score:.3f}"
        elif cell.place in places:
            state = "stale: its recipe has changed"
        say(f"{number}/{len(grid)}  {cell}: {state}")


def _time(
    request: Request,
    chosen: Selected,
    grid: Sequence[Cell],
    output: Path,
    make_step: Callable[[Cell], timing.Step],
    say: Say,
) -> bool:
    """Time the variants on one task, unless that has been done; False where it has failed."""
    task = chosen.bench.scales[request.scale].timed
    if task not in chosen.tasks:
        task = chosen.tasks[0]
    timed = [cell for cell in grid if cell.task == task and cell.seed == 0]
    path = output / TIMES
    known = timing.current(timing.read_times(path), timed)
    if timing.newest_with(known, chosen.variants):
        say(f"the steps on {task} are timed already")
        return True
    try:
        timing.write_times(path, timing.time_variants(timed, make_step, say, request.command))
    except FAILURES as error:
        say(f"timing: FAILED: {type(error).__name__}: {error}".partition("\n")[0])
        return False
    return True


def _write_table(chosen: Bench, scale: str, grid: Sequence[Cell], output: Path, say: Say) -> int:
    """Write table.md and the plot from all rows of today's recipes, this call's or not."""
    finished, stale = collect(chosen, scale, output, grid)
    if not (finished.rows or stale):
        say(f"{output / ROWS}: no finished cell yet, so there is no table")
        return 1
    if stale:
        say(f"{stale} rows of former recipes are not in the table")
    output.mkdir(parents=True, exist_ok=True)
    text = (chosen.report or _accuracy_and_memory)(finished, output)
    write_whole(output / TABLE, text)
    say(text)
    say(f"Table: {output / TABLE}")
    return 0


def _accuracy_and_memory(finished: Finished, output: Path) -> str:
    """The table and the plot of benches whose scores are better when they are higher."""
    from velora_torch.bench.plot import draw

    summary = summarise(
        finished.bench, finished.scale, finished.rows, finished.times, finished.expected
    )
    drawn = draw(summary, output / PLOT)
    return markdown(summary, f"{PLOT}.png" if drawn else None)
