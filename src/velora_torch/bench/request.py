"""What a user asks of `velora bench`, and which of its options a bench knows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEEDS, JOBS = 3, 1

SPEED = "speed"
"""The bench that times steps; all others are grids of training runs."""
OF_SPEED = ("cases", "rounds")
OF_GRIDS = ("tasks", "seeds", "jobs", "limit", "no_time")


@dataclass
class Request:
    """The command's arguments; None and False: not given."""

    name: str
    output: Path | None = None
    """None: runs/bench/NAME."""
    scale: str = "local"
    tasks: str | None = None
    """Names with commas between them; None: all."""
    variants: str | None = None
    seeds: int | None = None
    jobs: int | None = None
    limit: int | None = None
    """Cells to run in this call."""
    list_only: bool = False
    table_only: bool = False
    no_time: bool = False
    command: str = ""
    cases: str | None = None
    rounds: int | None = None

    @property
    def folder(self) -> Path:
        """Where the results are."""
        return self.output or Path("runs/bench") / self.name


class BenchError(ValueError):
    """A bench can't be run as asked."""


def check_options(request: Request) -> None:
    """Refuse options of another kind of bench, and numbers below one.

    Raises:
        BenchError: names the option.
    """
    foreign = OF_GRIDS if request.name == SPEED else OF_SPEED
    given = [f"--{name.replace('_', '-')}" for name in foreign if _is_given(request, name)]
    if given:
        own = OF_SPEED if request.name == SPEED else OF_GRIDS
        known = ", ".join(f"--{name.replace('_', '-')}" for name in own)
        raise BenchError(
            f"velora bench {request.name} has no {' or '.join(given)}; its own options are {known}"
        )
    for name in ("seeds", "jobs", "limit", "rounds"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise BenchError(f"--{name} must be at least 1, not {value}")


def _is_given(request: Request, name: str) -> bool:
    return getattr(request, name) not in (None, False)


def chosen_names(kind: str, given: str | None, known: Sequence[str]) -> list[str]:
    """The names of an option such as "a,b", in the order of those known; all where none is given.

    Raises:
        BenchError: one is unknown, and near misses are named; or there are none.
    """
    if given is None:
        return list(known)
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise BenchError(unknown(kind, name, known))
    if not names:
        raise BenchError(f"--{kind}s is empty; there are: {', '.join(known)}")
    return [name for name in known if name in names]


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """The message for a name that does not exist."""
    near = difflib.get_close_matches(name, known, 2, 0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"no {kind} {name!r}; {hint}there are: {', '.join(known)}"
