"""A plan as people read it: plain text, and a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from velora_torch.memory.planner.budget import gib

if TYPE_CHECKING:
    from rich.table import Table

    from velora_torch.memory.planner.candidates import Candidate
    from velora_torch.memory.planner.plan import Plan

CATEGORIES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer_state": "optimizer",
    "saved_activations": "saved",
    "logits": "logits",
    "temporary": "temporary",
}
"""Categories of a peak and their columns; they sum to it."""
WORDS = 2
"""Columns of words, after those of numbers."""


def asked(plan: Plan) -> str:
    """One line: the model, the step, and the budget."""
    parts = [f"{plan.model}, {plan.method}"]
    several = plan.ranks.several
    if several:
        parts.append(f"{plan.ranks.count} GPUs with {plan.ranks.strategy}")
    if plan.batch is not None:
        parts.append(f"batch {plan.batch}{' per rank' * several}")
    if plan.seq is not None:
        parts.append(f"{plan.seq} tokens")
    if plan.searched is not None:
        parts.append("the largest batch" if plan.searched == "batch" else "the longest sequence")
    return f"{', '.join(parts)}, within {gib(plan.budget_bytes)}{' each' * several}"


def header(plan: Plan) -> list[str]:
    """Column titles."""
    first = [] if plan.searched is None else [plan.searched]
    return [*first, "peak", *CATEGORIES.values(), "cost", "approximated gradient", "setup"]


def rows(plan: Plan) -> list[list[str]]:
    """The cells of all candidates; bytes in the plan's unit."""
    return [_row(candidate, unit(plan)[1]) for candidate in plan.candidates]


def unit(plan: Plan) -> tuple[str, int]:
    """Name and bytes of the unit of a plan's table: GiB, or MiB where all are small."""
    small = max((c.peak_bytes for c in plan.candidates), default=0) < 2**30
    return ("MiB", 2**20) if small else ("GiB", 2**30)


def _row(candidate: Candidate, unit: int) -> list[str]:
    peak = candidate.simulation.peak
    first = [] if candidate.largest is None else [str(candidate.largest)]
    setup = str(candidate.setup).removeprefix(f"{candidate.setup.method}, ")
    numbers = [candidate.peak_bytes, *(peak[name] for name in CATEGORIES)]
    cells = [f"{number / unit:.2f}" for number in numbers]
    return [*first, *cells, f"{candidate.step_cost:.2f}", str(candidate.coarseness), setup]


def note(plan: Plan) -> str:
    """What the columns mean."""
    of_ranks = ""
    if plan.ranks.several:
        what = "gathered weights and" if plan.ranks.shards else "buckets of"
        of_ranks = (
            f"All numbers are of one of {plan.ranks.count} ranks; temporary counts what it holds "
            f"for the others too: {what} gradients on their way.\n"
        )
    return of_ranks + (
        f"{unit(plan)[0]} at the largest moment of a step; cost: FLOPs of a step, 1.00 = plain.\n"
        f"Predicted, without what the device's allocator and libraries keep for themselves."
    )


def nothing_fits(plan: Plan) -> str:
    """The smallest setup, its categories, and how much is missing."""
    smallest = plan.smallest
    if smallest is None:
        return "Nothing fits, and nothing could be simulated."
    parts = [
        f"{label} {gib(smallest.simulation.peak[name])}"
        for name, label in CATEGORIES.items()
        if smallest.simulation.peak[name]
    ]
    return (
        f"Nothing fits. The smallest needs {gib(smallest.peak_bytes)}, "
        f"{gib(plan.missing_bytes)} more than there is:\n  {smallest.setup}\n  {', '.join(parts)}"
    )


def marks(plan: Plan) -> list[str]:
    """What is estimated and not simulated, and which setups were left out and why."""
    every = [*plan.candidates, *([plan.smallest] if plan.smallest else [])]
    lines = dict.fromkeys(mark for c in every for mark in c.simulation.estimated)
    return [
        *(f"estimated: {mark}" for mark in lines),
        *(f"skipped: {setup}: {reason}" for setup, reason in plan.skipped.items()),
    ]


def text(plan: Plan) -> str:
    """The plan in plain text."""
    lines = [asked(plan)]
    if plan.candidates:
        lines += _columns([header(plan), *rows(plan)])
        lines.append(note(plan))
    else:
        lines.append(nothing_fits(plan))
    return "\n".join([*lines, *marks(plan)])


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    lines = []
    for cells in rows:
        padded = [
            cell.ljust(width) if i >= len(cells) - WORDS else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def as_printed(plan: Plan, stream: TextIO) -> str:
    """The plan, with the recipe of its first candidate; folded to the width of a terminal."""
    lines = _folded(plan, stream) if stream.isatty() else f"{text(plan)}\n"
    if plan.candidates:
        best = plan.candidates[0]
        lines += f"\nA recipe's lines for the first, {best.setup}:\n\n{best.recipe_lines}"
    return lines


def _folded(plan: Plan, stream: TextIO) -> str:
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    with console.capture() as capture:
        if plan.candidates:
            console.print(_rich_table(plan))
            console.print(note(plan), markup=False)
        else:
            console.print(asked(plan), nothing_fits(plan), sep="\n", markup=False)
        for mark in marks(plan):
            console.print(mark, markup=False)
    return capture.get()


def _rich_table(plan: Plan) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Names are wrapped in Text: rich would read square brackets in a plain string as mark-up.
    table = Table(
        title=Text(asked(plan)), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    titles = header(plan)
    for index, title in enumerate(titles):
        words = index >= len(titles) - WORDS
        table.add_column(Text(title), justify="left" if words else "right", no_wrap=not words)
    for cells in rows(plan):
        table.add_row(*map(Text, cells))
    return table
