"""DeepSpeed's ZeRO, which can't train compressed layers: refused before anything is changed.

ZeRO gives the optimizer flat pieces of all parameters, and copies the result back. No optimizer
that holds ``coef`` is ever stepped, so that nobody learns by which rule it was changed (along v, or
along sign(v)), what weight decay the frozen weight should have had, or that new vectors are due.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor

MARKS = ("_hp_mapping", "ds_id")
"""Attributes that ZeRO gives parameters that it steps in pieces: stages 1 and 2, and stage 3."""

INSTEAD = (
    "Start without DeepSpeed: `torchrun --nproc-per-node N -m velora_torch train ...` trains with "
    "DDP, and with `--strategy fsdp2` parameters and optimizer state are sharded as in ZeRO"
)


def check_launch() -> None:
    """Refuse a run that `accelerate launch --use_deepspeed` has started.

    Raises:
        ValueError: says how to start it instead.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1", "yes"):
        raise ValueError(
            f"this process was started for DeepSpeed (ACCELERATE_USE_DEEPSPEED), whose ZeRO "
            f"optimizers can't train compressed layers exactly. {INSTEAD}"
        )


def check_parameters(trained: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters of compressed layers that ZeRO has taken.

    Args:
        trained: names of layers, and what trains in them.

    Raises:
        RuntimeError: names the first layer.
    """
    for name, parameter in trained:
        if any(hasattr(parameter, mark) for mark in MARKS):
            raise RuntimeError(
                f"VeLoRA: DeepSpeed's ZeRO trains layer {name!r} by flat copies of its parameters: "
                f"updates would be folded along the wrong direction, without weight decay, and "
                f"vectors never redrawn. {INSTEAD}; or call velora_torch.restore(model) before "
                f"deepspeed.initialize"
            )
