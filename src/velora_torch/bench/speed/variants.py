"""How each variant is made from a copy of the same model: what trains it, and how.

All variants of a case that compress do so with the same number of groups and a vector from the
first batch, which is then fixed: ours, the published way, and PEFT's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from velora_torch.bench.speed.cases import Case, Method
from velora_torch.config import DEFAULT_NUM_GROUPS

Side = Literal["plain", "peer", "ours"]

GROUPS = DEFAULT_NUM_GROUPS
RANK = 16
"""Of LoRA."""
OPTIMIZER: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01, "fused": True}
"""torch's AdamW; its states have the type of what it trains."""


@dataclass(frozen=True, kw_only=True)
class SpeedVariant:
    """One way to train; its settings are applied in the order of these fields."""

    name: str
    """As `--variants` takes it."""
    label: str
    """As tables and plots show it."""
    side: Side
    """Without VeLoRA, VeLoRA of others, or ours."""
    method: Method = "full"
    whole: bool = False
    """Times whole models alone."""
    casts: bool = True
    """LoRA: PEFT's default, adapters in float32 on a 16-bit base (`autocast_adapter_dtype`)."""
    peft_velora: bool = False
    """LoRA: PEFT's own VeLoRA."""
    reconstruct: bool = False
    """The published way: keep z, rebuild the input, multiply."""
    velora: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    """Settings of our VeloraConfig, with ``num_groups`` unless they say otherwise."""
    recompute: bool = False
    """Norms, activation functions and the loss computed again, but no block as a whole."""
    checkpoint: bool = False
    """Gradient checkpointing of every block."""
    compiled: bool = False
    """`torch.compile(model, fullgraph=True)`."""
    operators: bool = False
    """Folds with PyTorch's operators where C would do it."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a row of it depends on, as JSON values."""
        shown = dataclasses.asdict(self)
        for name in ("recompute", "operators"):  # which rows from before these do not have
            if not shown[name]:
                del shown[name]
        for name in ("name", "label", "side", "method", "whole"):
            del shown[name]
        return {**shown, "groups": GROUPS, "rank": RANK, "optimizer": OPTIMIZER}


# Where a layer is alone there is nothing to checkpoint: it would keep its input all the same.
FULL = [
    SpeedVariant(name="plain", label="plain", side="plain"),
    SpeedVariant(name="plain+gc", label="plain + GC", side="plain", whole=True, checkpoint=True),
    SpeedVariant(name="plain+compile", label="plain, compiled", side="plain", compiled=True),
    SpeedVariant(
        name="reconstruct", label="reconstruct, then multiply", side="peer", reconstruct=True
    ),
    SpeedVariant(name="dense", label="ours, dense", side="ours", velora={"gradient": "dense"}),
    SpeedVariant(name="factored", label="ours, factored", side="ours", velora={}),
    SpeedVariant(
        name="factored-operators",
        label="ours, factored, without C",
        side="ours",
        whole=True,
        velora={},
        operators=True,
    ),
    SpeedVariant(
        name="factored-m8",  # what docs/results/demo.md and the runs from scratch train with
        label="ours, factored, M = 8",
        side="ours",
        whole=True,
        velora={
            "sub_token_size": 8,
            "init": "random",
            "vectors": "per_group",
            "refresh_every": 50,
        },
    ),
    SpeedVariant(
        name="factored+recompute",
        label="ours, factored + recompute",
        side="ours",
        whole=True,
        velora={},
        recompute=True,
    ),
    SpeedVariant(
        name="factored+gc",
        label="ours, factored + GC",
        side="ours",
        whole=True,
        velora={},
        checkpoint=True,
    ),
    SpeedVariant(
        name="factored+compile",
        label="ours, factored, compiled",
        side="ours",
        velora={},
        compiled=True,
    ),
]

_ON_A: dict[str, Any] = {"targets": ["lora_A"]}
LORA = [
    SpeedVariant(name="lora", label="LoRA", side="plain", method="lora"),
    SpeedVariant(
        name="lora-nocast", label="LoRA, no casts", side="plain", method="lora", casts=False
    ),
    SpeedVariant(
        name="peft-velora",
        label="PEFT's VeLoRA",
        side="peer",
        method="lora",
        peft_velora=True,
    ),
    SpeedVariant(
        name="peft-velora-nocast",
        label="PEFT's VeLoRA, no casts",
        side="peer",
        method="lora",
        peft_velora=True,
        casts=False,
    ),
    SpeedVariant(name="lora+velora", label="LoRA + ours", side="ours", method="lora", velora=_ON_A),
    SpeedVariant(
        name="lora+velora-nocast",
        label="LoRA + ours, no casts",
        side="ours",
        method="lora",
        velora=_ON_A,
        casts=False,
    ),
]

BESIDE: dict[str, tuple[str, ...]] = {
    "factored": ("factored-operators",),
    "factored-m8": ("factored",),
    "factored+recompute": ("plain+gc", "factored"),
    "factored+gc": ("plain+gc",),
    "factored+compile": ("plain+compile", "factored"),
    "peft-velora-nocast": ("lora-nocast",),
    "lora+velora": ("peft-velora",),
    "lora+velora-nocast": ("lora-nocast", "peft-velora-nocast"),
}
"""Whom a variant is compared with besides its case's first one."""


@dataclass(frozen=True)
class Part:
    """A part of a layer's step, timed by itself (`parts.py`)."""

    name: str
    label: str
    side: Side
    when: str = ""
    """When in a step it runs."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a row of it depends on, as JSON values."""
        return {"part": self.name, "groups": GROUPS, "optimizer": OPTIMIZER}


PARTS = [
    Part("step", "compressed layer: whole step", "ours"),
    Part("product", "y = x Wᵀ", "ours", "forward"),
    Part("projection", "projection z = x v", "ours", "forward"),
    Part("input-gradient", "dX = dY W", "ours", "backward"),
    Part("factor", "factor C = dYᵀ z", "ours", "backward"),
    Part("optimizer", "AdamW on the coefficients", "ours", "optimizer"),
    Part("fold", "fold W += coef ⊗ e", "ours", "optimizer"),
    Part("plain-step", "plain layer: whole step", "plain"),
    Part("weight-gradient", "dW = dYᵀ x", "plain", "backward"),
    Part("plain-optimizer", "AdamW on the weight", "plain", "optimizer"),
    Part("fold-operators", "the fold with PyTorch's operators", "peer", "optimizer"),
    Part("factor-rows", "the factor as (zᵀ dY)ᵀ", "peer", "backward"),
    Part("siblings-apart", "three layers' projections of one input", "peer", "forward"),
    Part("siblings-together", "the same three as one product", "peer", "forward"),
]

Timed = SpeedVariant | Part
VARIANTS: list[Timed] = [*FULL, *LORA, *PARTS]


def variants_of(case: Case) -> list[Timed]:
    """What a case times; the first is what the others are compared with."""
    if case.level == "parts":
        return list(PARTS)
    chosen = FULL if case.method == "full" else LORA
    return [variant for variant in chosen if case.level == "model" or not variant.whole]
