"""Rows of simulated training steps, and pages whose tables are made from rows.

A page holds its prose and, between ``<!-- table NAME -->`` and ``<!-- end -->``, tables that a
command fills in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from velora_torch.memory.simulator.simulate import Simulation, simulate

GIB = 2**30
Row = dict[str, Any]
Tables = dict[str, str]


def held(model: Any, /, **settings: Any) -> Row:
    """What a simulated step holds: bytes at its peak, by category, and what belongs to it."""
    return as_row(simulate(model, **settings))


def as_row(simulation: Simulation) -> Row:
    """The numbers of a simulation, without its segments."""
    values = simulation.to_dict()
    for name in ("segments", "peak_gib", "simulated_depths"):
        values.pop(name)
    return values


def read_rows(path: Path) -> list[Row]:
    """Rows of a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def gib(nbytes: float, digits: int = 2) -> str:
    """Bytes in GiB."""
    rounded = round(nbytes / GIB, digits)
    return f"{rounded + 0.0:.{digits}f}"  # never -0.00


def fill(page: str, tables: Tables) -> str:
    """The page with its tables; every table of the page must be given, and no other."""
    names = re.findall(r"<!-- table (\S+) -->", page)
    assert sorted(names) == sorted(tables), (names, list(tables))

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{tables[match[2]]}\n\n<!-- end -->"

    return re.sub(r"(<!-- table (\S+) -->).*?<!-- end -->", table, page, flags=re.DOTALL)


def update(page: Path, tables: Tables) -> None:
    """Fill the tables of a page in place."""
    page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
