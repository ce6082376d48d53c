"""The text of a ledger: equal rows of repeated blocks are merged, as in a model's summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from velora_torch.memory.ledger.saves import Holder, Saved, any_block
from velora_torch.report.quantities import format_bytes

if TYPE_CHECKING:
    from velora_torch.memory.ledger.ledger import Ledger, WhatIf

MOST_LINES = 30
"""Lines of a table; what is smaller is summed up in one more."""
_HEADER = ("total", "count", "each", "shape", "dtype", "saved by", "also kept by")
_TO_THE_RIGHT = 3  # columns of numbers


class Line(NamedTuple):
    """What equal rows have in common."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    holder: str
    others: tuple[str, ...]


def merged(rows: Iterable[Saved]) -> list[tuple[Line, int]]:
    """Rows that differ in the number of their block alone, with their count; largest sum first."""
    counts = Counter(_line(row) for row in rows)
    return sorted(counts.items(), key=lambda item: -item[0].bytes * item[1])


def ledger_text(ledger: Ledger) -> str:
    """A table of all rows, and the totals by kind of layer and by operator."""
    lines = merged(ledger.rows)
    cells = [_HEADER, *(_cells(line, count) for line, count in lines[:MOST_LINES])]
    text = [
        f"{format_bytes(ledger.total_bytes)} saved for the backward pass in {len(ledger.rows)} "
        f"tensors, without parameters and buffers",
        *_aligned(cells),
    ]
    rest = lines[MOST_LINES:]
    if rest:
        size = format_bytes(sum(line.bytes * count for line, count in rest))
        text.append(f"  and {len(rest)} smaller lines: {size}")
    for title, totals in (
        ("kind of layer", ledger.by_layer_kind()),
        ("operator", ledger.by_operator()),
    ):
        text += ["", f"by {title} (a tensor counts for the first who saved it)"]
        shares = [(format_bytes(n), _share(n, ledger.total_bytes), k) for k, n in totals.items()]
        text += _aligned(shares, to_the_right=2)
    return "\n".join(text)


def what_if_text(what_if: WhatIf) -> str:
    """Bytes before and after, and the layers whose compression frees nothing."""
    before, after = what_if.before.total_bytes, what_if.total_bytes
    lines = [
        f"{len(what_if.layers)} layers compressed: {format_bytes(before)} -> {format_bytes(after)} "
        f"saved for the backward pass (freed {format_bytes(what_if.freed_bytes)}, added "
        f"{format_bytes(what_if.added_bytes)})"
    ]
    if what_if.useless:
        lines.append(f"{len(what_if.useless)} of them free nothing:")
    lines += [f"  {n:4} x {name}: {why}" for (name, why), n in counted(what_if.useless).items()]
    return "\n".join(lines)


def counted(reasons: dict[str, str]) -> dict[tuple[str, str], int]:
    """Number of layers by their last name and reason."""
    return dict(Counter((n.rpartition(".")[2] or "(root)", why) for n, why in reasons.items()))


def _line(row: Saved) -> Line:
    # Those of other blocks share a name: said once.
    others = tuple(dict.fromkeys(_other(holder, row.layer) for holder in row.holders[1:]))
    where = any_block(row.layer) or row.kind
    return Line(row.bytes, row.shape, row.dtype, f"{where} ({row.operator})", others)


def _other(holder: Holder, layer: str) -> str:
    if holder.layer == layer:
        return f"({holder.operator})"
    return f"{any_block(holder.name_beside(layer))} ({holder.operator})"


def _cells(line: Line, count: int) -> tuple[str, ...]:
    return (
        format_bytes(line.bytes * count),
        f"{count} x",
        format_bytes(line.bytes),
        " x ".join(map(str, line.shape)) or "1",
        line.dtype,
        line.holder,
        ", ".join(line.others),
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _aligned(rows: Sequence[Sequence[str]], to_the_right: int = _TO_THE_RIGHT) -> list[str]:
    if not rows:
        return ["  nothing"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if index < to_the_right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
