"""What the steps are meant to take at most, in bfloat16 on two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from velora_torch.bench.interleave import Spread
from velora_torch.bench.speed.rows import SpeedRow, against


@dataclass(frozen=True)
class Goal:
    """A variant's time over another's in one case."""

    case: str
    variant: str
    base: str
    most: float

    def measured(self, rows: Mapping[str, Sequence[SpeedRow]]) -> Spread | None:
        """The ratio in the newest session that has both; None without one.

        Args:
            rows: current rows by case.
        """
        return against(rows.get(self.case, ()), self.variant, self.base)

    def is_met(self, measured: Spread) -> bool:
        """Whether the median is small enough."""
        return measured.median <= self.most

    def __str__(self) -> str:
        return f"{self.case}: {self.variant} / {self.base}"


_LLAMAS = ("llama-1024", "llama-2048")
GOALS = [
    Goal("llama-1024", "factored", "plain", 0.78),
    Goal("llama-2048", "factored", "plain", 0.72),
    *(Goal(case, "factored+gc", "plain", 0.95) for case in _LLAMAS),
    *(Goal(case, "factored+gc", "plain+gc", 0.75) for case in _LLAMAS),
    *(
        Goal(case, "factored+compile", "plain+compile", most)
        for case, most in (("llama-1024", 0.78), ("llama-2048", 0.72))
    ),
    *(Goal(f"{case}-lora", "lora+velora", "peft-velora", 0.75) for case in _LLAMAS),
    *(Goal(f"{case}-lora", "lora+velora-nocast", "peft-velora-nocast", 0.97) for case in _LLAMAS),
    *(Goal(f"{case}-lora", "lora+velora", "lora", 1.0) for case in _LLAMAS),
    *(Goal(f"{case}-lora", "lora+velora-nocast", "lora-nocast", 1.0) for case in _LLAMAS),
]
"""In the order in which they are shown. The compiled ones: compiling must not lose the gain."""
