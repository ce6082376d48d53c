"""Pieces that the tables of all benches are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from velora_torch.report.quantities import format_seconds

MISSING = "-"


def markdown_grid(
    header: Sequence[str], body: Iterable[Sequence[str]], words: Sequence[str] = ()
) -> str:
    """A table in Markdown; the first column and those whose headers are in `words` are text."""
    text = {header[0], *words}
    lines = [list(header), ["---" if name in text else "---:" for name in header], *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def known(value: float | None, shown: Callable[[float], str]) -> str:
    """A number as `shown` has it; "-" where it was not measured."""
    return MISSING if value is None else shown(value)


class Measured(Protocol):
    """A row, as far as its origin goes."""

    @property
    def date(self) -> str:
        """When it was measured, in ISO format."""

    @property
    def command(self) -> str:
        """What the user typed."""

    @property
    def machine(self) -> dict[str, Any]:
        """As `machine_info` tells it."""

    @property
    def versions(self) -> dict[str, str]:
        """As `version_info` tells it."""


MeasuredT = TypeVar("MeasuredT", bound=Measured)


def origin(rows: Iterable[MeasuredT], spent: Callable[[MeasuredT], float]) -> str:
    """A paragraph for each command that rows come from: when, how long, on which machines.

    Args:
        rows: of one table.
        spent: seconds that a row took.
    """
    by_command: dict[str, list[MeasuredT]] = {}
    for row in sorted(rows, key=lambda row: row.date):
        by_command.setdefault(row.command, []).append(row)
    return "\n\n".join(_of_command(own, sum(map(spent, own))) for own in by_command.values())


def _of_command(rows: Sequence[Measured], seconds: float) -> str:
    """What its rows, oldest first, say; versions are those of the newest."""
    oldest, newest = rows[0], rows[-1]
    machines = dict.fromkeys(_machine(row) for row in rows)
    versions = ", ".join(
        f"{name} {newest.versions[name]}"
        for name in ("velora_torch", "torch", "transformers", "peft", "bitsandbytes")
        if name in newest.versions
    )
    return (
        f"Command: `{newest.command}`, {oldest.date[:10]} to {newest.date[:10]}, "
        f"{format_seconds(seconds)} in all. Machine: {'; '.join(machines)}. {versions}."
    )


def _machine(row: Measured) -> str:
    about = row.machine
    if not about:
        return "unknown"
    device = about.get("device", "cpu")
    kind = f" ({about['instructions']})" if about.get("instructions") else ""
    where = f"{about.get('cpu')}{kind}, {about.get('cores')} cores"
    if about.get("half_products") == "float32":
        where += " without bfloat16 instructions"
    return where if device == "cpu" else f"{device} ({where})"
