"""What the fuzz tests share: the number of cases, a watchdog, hostile values."""

from __future__ import annotations

import faulthandler
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

CASES = 2000
LONGEST = 10
"""Seconds of computing after which a case counts as one that hangs; it takes some milliseconds."""
WAITING = 300
"""Seconds on the clock after which the process is stopped, where it waits or C code hangs."""

fuzz = settings(
    max_examples=CASES,
    derandomize=True,  # the same cases in every run
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # shrinking is for a failure, by hand
    suppress_health_check=list(HealthCheck),
)


class Hang(BaseException):
    """A case did not come to an end: no `except Exception` may swallow it."""


@contextmanager
def watchdog() -> Iterator[None]:
    """Stop what does not end: this case where it computes, else the process, with a traceback."""

    def bark(number: int, frame: FrameType | None) -> None:
        raise Hang(f"no end after {LONGEST} s of computing")

    former = signal.signal(signal.SIGPROF, bark)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    faulthandler.dump_traceback_later(WAITING, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)


def tree(folder: Path) -> set[str]:
    """Everything in a folder, by name."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ------------------------------------------------------------------ values

NASTY = [
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "\udcff",
    "\u202e",
    "\ufeff",
    "\x1b[31m",
    "\r\n",
    "x" * 5000,
    "9" * 5000,
    "-1",
    "1e400",
    "NaN",
    "null",
    "~",
    "/",
    "//",
    ".",
    "..",
    "../..",
    "~nobody/x",
    "/dev/null",
    "/proc/self/mem",
    "/etc/passwd",
    "a/b",
    "a/b/c",
    "a" * 300,
    "%s%n{0}{}",
    "{input.__class__}",
    "{instruction!r:>1000000000000}",
    "{instruction:{input}}",
    "{input[0]}",
    "{{ 7 * 7 }}",
    "${HOME}",
    "$(touch executed)",
    "'; drop",
    "(",
    "(a+)+$",
    "[[:",
    "(?P<x",
    "(" * 200,
    "a{99999999999}",
    "<script>alert(1)</script>",
    "[bold]",
    "[/]",
]
texts = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=20),
    st.text(st.characters(), max_size=8),  # surrogates too
)
whole_numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**20, 10**400, -(10**400)]),
)
numbers = st.one_of(
    whole_numbers,
    st.floats(),
    st.sampled_from([math.inf, -math.inf, math.nan, 1e308, 5e-324, -0.0]),
)
scalars: st.SearchStrategy[Any] = st.one_of(st.none(), st.booleans(), numbers, texts)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=6,
)


def nested(depth: int, opening: str, closing: str, core: str = "1") -> str:
    """Brackets in brackets."""
    return opening * depth + core + closing * depth


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some of them flipped, cut out, doubled, put in or left off."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 40))
        how = draw(st.integers(0, 5))
        part = data[place : place + length]
        if how == 0:
            data = data[:place]
        elif how == 1 and part:
            data = (
                data[:place] + bytes([part[0] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
            )
        elif how == 2:
            data = data[:place] + data[place + length :]
        elif how == 3:
            data = data[:place] + part + part + data[place + length :]
        elif how == 4:
            data = data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:]
        else:
            data = data[:place] + draw(texts).encode("utf-8", "surrogatepass") + data[place:]
    return data
