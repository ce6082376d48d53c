"""Runs the cells of a grid one after another, or several at a time, and keeps what they measure."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from velora_torch.bench.grid import Cell, Row, newest, row_from_json, row_to_json
from velora_torch.bench.progress import cell_line, seconds_left
from velora_torch.bench.store import append_line, read_lines
from velora_torch.quiet import quiet

RunCell = Callable[[Cell], Row]
Say = Callable[[str], None]

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What one cell may fail with while the others go on. Ctrl-C is none of it."""


@dataclass
class Outcome:
    """What became of a grid."""

    rows: list[Row] = field(default_factory=list)
    """All finished cells: this call's and earlier ones'."""
    failed: dict[Cell, str] = field(default_factory=dict)
    left: int = 0
    """Cells that a limit has left for another call."""


@dataclass
class Runner:
    """Runs what is open in a grid; a finished cell is on the disk before the next one is shown.

    Args:
        path: rows.jsonl.
        run_cell: runs one cell; for `jobs` above 1 a function of a module, so that other
            processes find it.
        say: shows a line.
        jobs: cells that run at the same time, each in a process of its own.
        clock: seconds since whenever.
    """

    path: Path
    run_cell: RunCell
    say: Say
    jobs: int = 1
    clock: Callable[[], float] = time.monotonic

    def finished(self, grid: Sequence[Cell]) -> tuple[dict[Cell, Row], list[Row]]:
        """Cells that have a row, and rows of cells whose recipe has changed since."""
        return newest(read_rows(self.path), grid)

    def run(self, grid: Sequence[Cell], limit: int | None = None) -> Outcome:
        """Run the cells that have no row yet.

        Args:
            grid: all cells, in their order.
            limit: run at most so many.

        Returns:
            All rows of the grid, and the reasons of the cells that failed.

        Raises:
            KeyboardInterrupt: Ctrl-C; finished cells have their rows.
        """
        found, stale = self.finished(grid)
        todo = [cell for cell in grid if cell not in found]
        self.say(
            f"{len(grid)} cells: {len(found)} finished, {len(stale)} to run again because their "
            f"recipe has changed, {len(todo) - len(stale)} new"
        )
        outcome = Outcome(list(found.values()))
        now = todo if limit is None else todo[:limit]
        outcome.left = len(todo) - len(now)
        start, waiting = self.clock(), list(now)
        for cell, result in self._results(now):
            waiting.remove(cell)
            number = len(outcome.rows) + len(outcome.failed) + 1
            if isinstance(result, str):
                outcome.failed[cell] = result
                self.say(f"cell {number}/{len(grid)}: {cell}: FAILED: {result}")
                continue
            append_line(self.path, row_to_json(result))
            outcome.rows.append(result)
            left = seconds_left(outcome.rows, waiting, self.jobs)
            self.say(cell_line(number, len(grid), result, self.clock() - start, left))
        return outcome

    def _results(self, todo: Sequence[Cell]) -> Iterator[tuple[Cell, Row | str]]:
        if self.jobs == 1:
            for cell in todo:
                yield cell, attempt(self.run_cell, cell)
            return
        waiting = list(todo)
        while waiting:
            yield from self._in_processes(waiting)

    def _in_processes(self, waiting: list[Cell]) -> Iterator[tuple[Cell, Row | str]]:
        """Run cells in a pool of processes until none waits or a process dies; empties `waiting`.

        No more cells than processes are handed out at a time: it is known which ones a dying
        process may have taken along, and the order of the grid is kept.
        """
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(
            self.jobs, multiprocessing.get_context("spawn"), _prepare_worker, (self.jobs,)
        )
        running: dict[Future[Row | str], Cell] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    running[pool.submit(attempt, self.run_cell, waiting[0])] = waiting[0]
                    waiting.pop(0)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    yield running.pop(future), result
            pool.shutdown()
        except BrokenProcessPool:
            for cell in running.values():
                yield cell, "its process was killed; out of memory? Try fewer --jobs"
        finally:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            # The pool's own thread sees them end and joins them; two who join race.
            pool.shutdown(wait=True, cancel_futures=True)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in the order in which they were written.

    Raises:
        ValueError: a line is not a row; the message names it.
    """
    rows = []
    for number, document in enumerate(read_lines(path), 1):
        try:
            rows.append(row_from_json(document))
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}; remove the line") from None
    return rows


def attempt(run_cell: RunCell, cell: Cell) -> Row | str:
    """Run a cell; the reason where it fails."""
    try:
        return run_cell(cell)
    except FAILURES as error:
        return first_line(error)


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]


def threads_for(jobs: int) -> int:
    """Threads of one of so many processes that share the machine."""
    from velora_torch.report.environment import machine_info

    return max(1, machine_info().cores // jobs)


def _prepare_worker(jobs: int) -> None:
    """Before a worker imports torch: its share of the cores; Ctrl-C is the main process's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threads = str(threads_for(jobs))
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    quiet()
    import torch

    torch.set_num_threads(int(threads))


def _end_with_parent() -> None:
    """End this worker when the process that wants its result is gone, however it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
