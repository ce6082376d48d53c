"""What a compressed layer remembers besides its weight and coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from velora_torch.config import VeloraConfig

TENSORS = ("vectors", "delta", "running", "turn", "sign_turn")
"""Tensors of a compressed layer besides ``coef`` (buffers ``velora_*``, not in ``state_dict``)."""

_SET_UP = ("config", "frozen")
"""Fields that compressing sets: no part of a run's state."""


@dataclass
class LayerState:
    """What a compressed layer remembers besides tensors. All fields are JSON values."""

    name: str
    groups: int
    size: int
    config: VeloraConfig = field(repr=False)
    frozen: bool = False
    """The weight was frozen before it was compressed (``train_frozen``): the base stays."""
    drawn: bool = False
    """Vectors were chosen (by data, or at once for random ones)."""
    due: bool = True
    """The next training forward draws vectors."""
    draws: int = 0
    steps: int = 0
    """Optimizer steps since the layer was compressed."""
    folds: int = 0
    direction: str = "v"
    """What pending coefficients multiply: ``v``, or ``sign`` for scale-invariant optimizers."""
    pending: bool = False
    """``coef`` holds updates that are not in the weight yet."""
    delta_direction: str | None = None
    """The direction of the sum of all folds."""
    lost: str | None = None
    """Why that sum does not turn the first weight into the present one, if so."""

    def counters(self) -> dict[str, Any]:
        """What a checkpoint needs besides the configuration."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _SET_UP}
