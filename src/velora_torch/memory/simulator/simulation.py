"""The outcome of a simulated training step."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from velora_torch.memory.simulator.setup import Setup
from velora_torch.memory.simulator.tracker import ByCategory, Flops


@dataclass(frozen=True)
class Coarseness:
    """How much of the weight gradient is approximated."""

    weights: int
    """Trained weights whose gradient is coarse."""
    trained: int
    """All trained weights."""
    kept: int
    """Numbers that the coarse gradients have."""

    @property
    def share(self) -> float:
        """Share of the trained weights whose gradient is coarse."""
        return self.weights / self.trained if self.trained else 0.0

    @property
    def factor(self) -> float:
        """How many times smaller a coarse gradient is (1.0 where there is none)."""
        return self.weights / self.kept if self.kept else 1.0

    @property
    def dropped(self) -> float:
        """Share of the gradients' numbers that training does without."""
        return (self.weights - self.kept) / self.trained if self.trained else 0.0

    def __str__(self) -> str:
        """Such as ``96% of the weights, 1/128``."""
        return f"{self.share:.0%} of the weights, 1/{self.factor:.0f}" if self.kept else "exact"


@dataclass(frozen=True)
class Simulation:
    """What a training step holds at its largest moment, and what it computes."""

    model: str
    setup: Setup
    batch: int | None
    seq: int | None
    device: str
    peak_bytes: int
    """The largest moment of the steps."""
    peak: ByCategory
    """That moment by category."""
    peak_at: str
    """The segment of that moment, such as ``backward, layers, last block``."""
    weights: int
    saved: int
    """Saved activations and logits when a forward pass has ended."""
    gradients: int
    optimizer_state: int
    flops: Flops
    """Of one step."""
    coarseness: Coarseness
    segments: dict[str, int] = field(repr=False, default_factory=dict)
    """The largest moment of each segment."""
    moments: dict[str, ByCategory] = field(repr=False, default_factory=dict)
    """The same by category."""
    exchanged: int = 0
    """Of the peak: what a rank of several holds to exchange gradients or weights."""
    simulated_depths: tuple[int, ...] = ()
    """Depths that were simulated; empty: the whole model."""
    estimated: tuple[str, ...] = ()
    """What of it is arithmetic and not simulation."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready numbers."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["setup"] = self.setup.to_dict()
        values["flops"] = {**vars(self.flops), "total": self.flops.total}
        values["coarseness"] = vars(self.coarseness)
        values["peak_gib"] = self.peak_bytes / 2**30
        return values

    def __str__(self) -> str:
        """A short table."""
        size = "" if self.batch is None else f", batch {self.batch}"
        size += "" if self.seq is None else f" x {self.seq} tokens"
        lines = [
            f"{self.model}{size}: {self.setup}",
            f"  peak              {_gib(self.peak_bytes)}  ({self.peak_at})",
        ]
        lines += [f"    {n.replace('_', ' '):18}{_gib(b)}" for n, b in self.peak.items() if b]
        lines.append(f"  saved by forward  {_gib(self.saved)}")
        lines.append(f"  gradients         {_gib(self.gradients)}")
        lines += [f"  estimated: {mark}" for mark in self.estimated]
        return "\n".join(lines)


def where(segment: str) -> str:
    """The name of a segment, such as ``backward, layers, last block``, in words."""
    phase, _, place = segment.partition(":")
    if not place or phase == "optimizer":
        return phase
    blocks, _, part = place.rpartition("/")
    part = {"before": "before its blocks", "after": "after its blocks"}.get(part, f"{part} block")
    return f"{phase}, {blocks}, {part}"


def _gib(number: int) -> str:
    return f"{number / 2**30:8.3f} GiB"
