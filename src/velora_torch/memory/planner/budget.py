"""Sizes of memory as people write them."""

from __future__ import annotations

import re

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

MOST = 2**60
"""Bytes that no machine has: more is a slip of the pen."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*")


def parse_budget(budget: str | int) -> int:
    """Bytes of a size such as ``"24GiB"``, ``"24 GB"`` or ``"8000MiB"``; a number is bytes.

    GB is 10**9 bytes, GiB is 2**30.

    Raises:
        ValueError: it is no size, has no unit, is not positive, or is beyond any machine (2**60).
    """
    size: float | None = None
    if isinstance(budget, int) and not isinstance(budget, bool):
        size = budget
    elif isinstance(budget, str) and (match := _SIZE.fullmatch(budget)):
        unit = UNITS.get(match[2].upper())
        size = None if unit is None else float(match[1]) * unit
    if size is None or not 1 <= size <= MOST:
        raise ValueError(
            f"cannot read the memory budget {budget!r}: expected a positive number with a unit, "
            f"such as '24GiB' (2**30 bytes each), '24 GB' (10**9) or '8000MiB'"
        )
    return int(size)


def gib(count: int) -> str:
    """1610612736 -> "1.50 GiB"; what would read 0.00 is given in MiB."""
    if 0 < abs(count) < 2**30 / 100:
        return f"{count / 2**20:.2f} MiB"
    return f"{count / 2**30:.2f} GiB"
