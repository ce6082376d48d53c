"""One line of rows.jsonl: the steps of one variant of a case, in one session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from velora_torch.bench.grid import digest
from velora_torch.bench.interleave import Spread, ratios, spread
from velora_torch.bench.speed.cases import Case
from velora_torch.bench.speed.variants import Timed, variants_of
from velora_torch.bench.store import read_records
from velora_torch.bench.timing import newest_with


@dataclass
class SpeedRow:
    """Times of a variant's training step, in seconds, and its FLOPs."""

    case: str
    variant: str
    fingerprint: str
    """Of everything that is computed."""
    session: str
    """Date of the start; only times of one session are compared with each other."""
    rounds: int
    seconds: list[float]
    """One for each round, in the order of the rounds."""
    median: float
    low: float
    lower_quartile: float
    upper_quartile: float
    high: float
    base: str
    """The case's first variant, timed in the same rounds."""
    ratio: float
    """Median over the rounds of this variant's time over the base's."""
    ratio_lower: float
    """Lower quartile of it."""
    ratio_upper: float
    flops: int
    """Of one step: matrix products, convolutions, attention."""
    flops_ratio: float
    """To the base's."""
    threads: int
    dtype: str
    settings: dict[str, Any]
    """Of the case and of the variant."""
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str = field(default="")
    saved_activations: int | None = None
    """Bytes that autograd keeps for the backward pass; None where nobody counted them."""

    @property
    def date(self) -> str:
        """When it was measured."""
        return self.session


def read_rows(path: Path) -> list[SpeedRow]:
    """The lines of rows.jsonl, in their order.

    Raises:
        ValueError: a line is not such a row.
    """
    return read_records(path, SpeedRow, "a row of `velora bench speed`")


def make_rows(
    case: Case,
    seconds: dict[str, list[float]],
    flops: dict[str, int],
    around: dict[str, Any],
    command: str = "",
    saved: Mapping[str, int | None] | None = None,
) -> list[SpeedRow]:
    """The rows of a session.

    Args:
        case: what was timed.
        seconds: times of each variant, round by round; the first one is the base.
        flops: of a step of each variant.
        around: when and where, as :func:`velora_torch.bench.surroundings.surroundings` tells.
        command: what the user has typed.
        saved: bytes that autograd keeps for the backward pass of each variant, where counted.
    """
    known = {variant.name: variant for variant in variants_of(case)}
    base = next(iter(seconds))
    rows = []
    for name, own in seconds.items():
        relative = spread(ratios(own, seconds[base]))
        rows.append(
            SpeedRow(
                case=case.name,
                variant=name,
                fingerprint=fingerprint(case, known[name]),
                rounds=len(own),
                seconds=own,
                **vars(spread(own)),
                base=base,
                ratio=relative.median,
                ratio_lower=relative.lower_quartile,
                ratio_upper=relative.upper_quartile,
                flops=flops[name],
                flops_ratio=flops[name] / flops[base],
                dtype=case.dtype,
                settings={"case": dict(case.settings), "variant": known[name].settings},
                command=command,
                saved_activations=(saved or {}).get(name),
                **around,
            )
        )
    return rows


def fingerprint(case: Case, variant: Timed) -> str:
    """Identifies what a variant of a case computes."""
    return digest({"case": dict(case.settings), "variant": variant.settings})


def current(rows: Iterable[SpeedRow], case: Case) -> list[SpeedRow]:
    """The rows of a case that compute what it computes today."""
    known = {variant.name: fingerprint(case, variant) for variant in variants_of(case)}
    return [
        row for row in rows if row.case == case.name and known.get(row.variant) == row.fingerprint
    ]


def finished(
    rows: Sequence[SpeedRow],
    case: Case,
    names: Sequence[str],
    rounds: int,
    around: Mapping[str, Any] | None = None,
) -> dict[str, SpeedRow]:
    """The newest session with all of some variants and enough rounds; {} where there is none.

    Args:
        rows: of any case.
        case: which.
        names: the variants.
        rounds: the fewest.
        around: as `surroundings` tells; rows of another CPU, device, number of threads or release
            of torch do not count. None: all do.
    """
    enough = [row for row in current(rows, case) if row.rounds >= rounds]
    if around is not None:
        here = _place(around["threads"], around["machine"], around["versions"])
        enough = [r for r in enough if _place(r.threads, r.machine, r.versions) == here]
    return newest_with(enough, names)


def _place(
    threads: int, machine: Mapping[str, Any], versions: Mapping[str, str]
) -> tuple[Any, ...]:
    """What two times must have in common to say the same."""
    named = (machine.get(name) for name in ("cpu", "cores", "instructions", "device"))
    return (threads, versions.get("torch"), *named)


def against(rows: Sequence[SpeedRow], variant: str, base: str) -> Spread | None:
    """Time of a variant over another's in the newest session that has both; None without one.

    Args:
        rows: of one case, all current.
        variant: whose time.
        base: over whose.
    """
    both = newest_with(rows, [variant, base])
    return spread(ratios(both[variant].seconds, both[base].seconds)) if both else None


def flops_against(rows: Sequence[SpeedRow], variant: str, base: str) -> float | None:
    """FLOPs of a variant over another's, where :func:`against` has their times."""
    both = newest_with(rows, [variant, base])
    return both[variant].flops / both[base].flops if both else None
