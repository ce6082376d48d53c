"""What `velora bench speed` does: choose cases and variants, time what is open, write the table."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from velora_torch.atomic import write_whole
from velora_torch.bench.request import (
    BenchError,
    Request,
    check_options,
    chosen_names,
    unknown,
)
from velora_torch.bench.runner import FAILURES, first_line
from velora_torch.bench.speed.cases import CASES, SCALES, Case, cases_of
from velora_torch.bench.speed.rows import SpeedRow, finished, read_rows
from velora_torch.bench.speed.session import Outcome, run_case
from velora_torch.bench.speed.table import found_rows, markdown
from velora_torch.bench.speed.variants import VARIANTS, Timed, variants_of
from velora_torch.bench.store import append_line
from velora_torch.bench.surroundings import surroundings
from velora_torch.half_products import slow_types
from velora_torch.lock import alone
from velora_torch.report.quantities import format_ratio

Say = Callable[[str], None]
RunCase = Callable[[Case, Sequence[Timed], int, Say], Outcome]
ROWS, TABLE, PLOT = "rows.jsonl", "table.md", "speed"
ROUNDS = 15


@dataclass
class Task:
    """A case, and those of its variants that are wanted."""

    case: Case
    variants: list[Timed]
    """The case's first variant, which all are compared with, is always one of them."""

    @property
    def names(self) -> list[str]:
        """Of the variants."""
        return [variant.name for variant in self.variants]


def speed(
    request: Request,
    say: Say,
    run: RunCase | None = None,
    known: Sequence[Case] = CASES,
) -> int:
    """Time what has not been timed yet, and write table and plot.

    Args:
        request: what to time.
        say: shows a line.
        run: times one case; None does it.
        known: all cases.

    Returns:
        0, or 1 where something has failed or there is no row for a table.

    Raises:
        BenchError: options or names that are unknown, or packages are missing; nothing has run.
        KeyboardInterrupt: Ctrl-C; the rows of finished cases are kept, and the table shows them.
    """
    tasks = select(request, known)
    rounds, path = request.rounds or ROUNDS, request.folder / ROWS
    if request.list_only:
        _list(tasks, read_rows(path), rounds, surroundings(), say)
        return 0
    if request.table_only:
        return _write_table(request.folder, known, say)
    check_packages(tasks)
    _warn_of_slow_types(tasks, say)
    if run is None:
        run = partial(run_case, command=request.command)
    failed: list[str] = []
    around = surroundings()
    with alone(request.folder, "velora bench", "--output"):
        try:
            for number, task in enumerate(tasks, 1):
                say(f"case {number}/{len(tasks)}: {task.case.name}: {task.case.about}")
                if finished(read_rows(path), task.case, task.names, rounds, around):
                    say(f"{task.case.name}: timed already")
                    continue
                outcome = _attempt(run, task, rounds, say)
                for row in outcome.rows:
                    append_line(path, dataclasses.asdict(row))
                if outcome.rows:
                    say(f"{task.case.name}: {_ratios(outcome.rows)}")
                failed += [f"{task.case.name}, {n}: {why}" for n, why in outcome.failed.items()]
        except KeyboardInterrupt:
            say("interrupted: finished cases are kept; the same command goes on")
            _write_table(request.folder, known, say)
            raise
    for line in failed:
        say(f"failed: {line}")
    return _write_table(request.folder, known, say) or int(bool(failed))


def _warn_of_slow_types(tasks: Sequence[Task], say: Say) -> None:
    slow = {str(dtype).removeprefix("torch.") for dtype in slow_types()}
    cases = ",".join(task.case.name for task in tasks if task.case.dtype in slow)
    if cases:
        say(
            "this CPU has no bfloat16 instructions: PyTorch multiplies bfloat16 dozens of "
            f"times slower than float32, and is timed as it is. Such cases: {cases}"
        )


def _attempt(run: RunCase, task: Task, rounds: int, say: Say) -> Outcome:
    """Time a case; one that fails as a whole leaves the others to go on."""
    try:
        return run(task.case, task.variants, rounds, say)
    except FAILURES as error:
        return Outcome(failed={"all variants": first_line(error)})


def select(request: Request, known: Sequence[Case] = CASES) -> list[Task]:
    """Look up what a request names.

    Raises:
        BenchError: an option of other benches, a name that does not exist, or no chosen case has
            any of the chosen variants.
    """
    check_options(request)
    if request.scale not in SCALES:
        raise BenchError(unknown("scale", request.scale, list(SCALES)))
    cases = cases_of(request.scale, known)
    if request.cases is not None:
        names = chosen_names("case", request.cases, [case.name for case in known])
        cases = [case for case in known if case.name in names]
    wanted = chosen_names("variant", request.variants, [variant.name for variant in VARIANTS])
    tasks = []
    for case in cases:
        base, *others = variants_of(case)
        chosen = [variant for variant in others if variant.name in wanted]
        if chosen or base.name in wanted:
            tasks.append(Task(case, [base, *chosen]))
    if not tasks:
        raise BenchError(
            f"none of the cases {', '.join(case.name for case in cases)} has a variant "
            f"{' or '.join(wanted)}; --list shows what each has"
        )
    return tasks


def check_packages(tasks: Sequence[Task]) -> None:
    """Name every package that is missing.

    Raises:
        BenchError: one is.
    """
    needs = {"matplotlib": "train"}
    if any(task.case.level == "model" for task in tasks):
        needs["transformers"] = "train"
    if any(task.case.method == "lora" for task in tasks):
        needs["peft"] = "peft"
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise BenchError(
            "the bench cannot run:\n  "
            + "\n  ".join(
                f"the package {name} is not installed: pip install 'velora-torch[{needs[name]}]'"
                for name in missing
            )
        )


def _list(
    tasks: Sequence[Task],
    rows: Sequence[SpeedRow],
    rounds: int,
    around: Mapping[str, Any],
    say: Say,
) -> None:
    """Show every case, its state and its variants."""
    for number, task in enumerate(tasks, 1):
        here = list(finished(rows, task.case, task.names, rounds, around).values())
        anywhere = list(finished(rows, task.case, task.names, rounds).values())
        state = f"open, {', '.join(task.names)}"
        if here:
            state = f"finished, {_ratios(here)}"
        elif anywhere:
            state += f"; with another CPU, torch or number of threads {_ratios(anywhere)}"
        say(f"{number}/{len(tasks)}  {task.case.name} ({task.case.about}): {state}")


def _ratios(rows: Sequence[SpeedRow]) -> str:
    """ "factored 0.77×, dense 0.90× plain": all variants but the first, over the first."""
    others = [row for row in rows if row.variant != row.base]
    if not others:
        return f"{rows[0].variant} alone"
    shown = ", ".join(f"{row.variant} {format_ratio(row.ratio)}" for row in others)
    return f"{shown} of {rows[0].base}"


def _write_table(folder: Path, known: Sequence[Case], say: Say) -> int:
    """Write table.md and the plot from all rows of today's cases, this call's or not."""
    rows = read_rows(folder / ROWS)
    found = found_rows(rows, known)
    if not found:
        say(f"{folder / ROWS}: no finished case yet, so there is no table")
        return 1
    stale = len(rows) - sum(map(len, found.values()))
    if stale:
        say(f"{stale} rows of former cases or variants are not in the table")
    from velora_torch.bench.speed.plot import draw

    drawn = draw(found, known, folder / PLOT)
    text = markdown(found, known, f"{PLOT}.png" if drawn else None)
    write_whole(folder / TABLE, text)
    say(text)
    say(f"Table: {folder / TABLE}")
    return 0
