"""DeepSpeed's ZeRO-1 and 2: its optimizer steps flat pieces of the parameters; followed here.

ZeRO gives an ordinary optimizer one flat float32 piece of all parameters, which holds some of the
coefficients, all or none, and copies what came of it to every process. So no optimizer that holds
``coef`` is ever stepped; what happens around its step has to happen around ZeRO's. The coefficients
are whole in every process after it, and all fold the same.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from velora_torch.optimizers import Group, Rule

ZERO = "deepspeed.runtime.zero.stage_1_and_2"
"""The module whose class `DeepSpeedZeroOptimizer` is ZeRO-1 and 2."""

COPYING = {
    "deepspeed.runtime.bf16_optimizer": ("BF16_Optimizer", "bf16_groups"),
    "deepspeed.runtime.fp16.fused_optimizer": ("FP16_Optimizer", "fp16_groups"),
    "deepspeed.runtime.fp16.unfused_optimizer": ("FP16_UnfusedOptimizer", "fp16_groups"),
}
"""DeepSpeed's optimizers without ZeRO that step float32 copies: module, class, what they hold."""

PIECE = "_hp_mapping"
"""Attribute of a parameter that ZeRO-1 or 2 steps: which piece this process has of it, or None."""
MARKS = (PIECE, "ds_id")
"""Attributes that DeepSpeed gives parameters that it steps in pieces; the second is ZeRO-3's."""

INSTEAD = (
    "Use zero_optimization.stage 1 or 2; or `velora train` with --strategy fsdp2, which shards "
    "parameters and optimizer state as ZeRO-3 does"
)

Watcher = Callable[[Any], None]
Held = Iterable[Iterable[Tensor]]

_watchers: list[tuple[Watcher, Watcher]] = []
_refusers: list[Callable[[Held], None]] = []
_stepping: list[Optimizer] = []
"""Optimizers inside of a ZeRO that is followed, while it steps."""


def watch_steps(before: Watcher, after: Watcher) -> None:
    """Call functions with ZeRO's optimizer before each of its steps, and after each that was made.

    Takes effect at :func:`notice`, since this must not import DeepSpeed.
    """
    _watchers.append((before, after))


def watch_copies(refuse: Callable[[Held], None]) -> None:
    """Call a function with the model's parameters of which DeepSpeed is about to step copies."""
    _refusers.append(refuse)


def notice() -> None:
    """Begin to follow ZeRO's steps if DeepSpeed is there by now; costs one look at a dictionary."""
    if ZERO in sys.modules:
        _follow()


@functools.cache
def _follow() -> None:
    kind = sys.modules[ZERO].DeepSpeedZeroOptimizer
    original = kind.step

    @functools.wraps(original)
    def step(zero: Any, *args: Any, **kwargs: Any) -> Any:
        for before, _ in _watchers:
            before(zero)
        _stepping.append(zero.optimizer)
        try:
            result = original(zero, *args, **kwargs)
        finally:
            _stepping.pop()
        if not zero.overflow:
            for _, after in _watchers:
                after(zero)
        return result

    kind.step = step
    for module, (name, attribute) in COPYING.items():
        _refuse_copies(getattr(sys.modules.get(module), name, None), attribute)


def _refuse_copies(kind: Any, attribute: str) -> None:
    if kind is None:
        return
    original = kind.step

    @functools.wraps(original)
    def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        for refuse in _refusers:
            refuse(getattr(optimizer, attribute))
        return original(optimizer, *args, **kwargs)

    kind.step = step


def is_followed(optimizer: Optimizer) -> bool:
    """Whether it is stepping inside of a ZeRO whose steps are followed."""
    return any(one is optimizer for one in _stepping)


def takes_gradients(parameter: Tensor) -> bool:
    """Whether a gradient that is gone from a parameter has only been put elsewhere."""
    return hasattr(parameter, PIECE)


def split_by_type(optimizer: Optimizer) -> list[int]:
    """Give each type of parameter a group of its own, before DeepSpeed flattens the groups.

    Returns:
        For each group the number of the one that it was taken from.
    """
    kinds = [
        (number, group, kind)
        for number, group in enumerate(optimizer.param_groups)
        for kind in dict.fromkeys(p.dtype for p in group["params"])
    ]
    optimizer.param_groups = [
        {**group, "params": [p for p in group["params"] if p.dtype == kind]}
        for _, group, kind in kinds
    ]
    return [number for number, _, _ in kinds]


def parts(zero: Any) -> list[tuple[list[Tensor], Group]]:
    """What ZeRO trains: the model's own parameters, and the settings they are stepped with."""
    return list(zip(zero.bit16_groups, zero.optimizer.param_groups, strict=True))


def own_part(parameter: Tensor) -> tuple[slice, slice] | None:
    """What this process steps of a parameter: where in it, flattened, and where in its flat piece.

    None: nothing, it is all in other processes' pieces.
    """
    piece = getattr(parameter, PIECE, None)
    if piece is None:
        return None
    here, there = piece.lp_fragment_address, piece.hp_fragment_address
    return (
        slice(here.start, here.start + here.numel),
        slice(there.start, there.start + there.numel),
    )


@torch.no_grad()
def turn_moments(zero: Any, rule: Rule, coef: Tensor, turn_G: Tensor, sign_turn_G: Tensor) -> None:
    """As `optimizers.turn_moments`, in the piece of the moments that this process has.

    Args:
        zero: ZeRO's optimizer.
        rule: of the optimizer that it steps.
        coef: (O, G).
        turn_G: cosines between old and new vectors.
        sign_turn_G: the same of their signs.
    """
    part = own_part(coef)
    if part is None:
        return
    here, there = part
    flat = zero.single_partition_of_fp32_groups[getattr(coef, PIECE).param_group_index]
    state = zero.optimizer.state.get(flat, {})
    for names, factor_G in ((rule.moments, turn_G), (rule.sign_moments, sign_turn_G)):
        for name in names:
            if isinstance(state.get(name), Tensor):
                moment = state[name][there]
                moment.mul_(factor_G.expand(coef.shape).flatten()[here].to(moment))


@torch.no_grad()
def clear_master(coef: Tensor) -> None:
    """Zero ZeRO's float32 copy of coefficients that were folded, else they would come back."""
    piece = getattr(coef, PIECE, None)
    if piece is not None:
        piece.hp_fragment.zero_()


def is_taken(parameter: Tensor) -> bool:
    """Whether DeepSpeed has marked a parameter that it steps in pieces."""
    return any(hasattr(parameter, mark) for mark in MARKS)


def refuse(layer: str) -> None:
    """Refuse to train a compressed layer in a way that isn't followed.

    Raises:
        RuntimeError: names the layer.
    """
    raise RuntimeError(
        f"VeLoRA: DeepSpeed trains layer {layer!r} by copies of its parameters that aren't "
        f"followed, with ZeRO-3, or without ZeRO in 16 bits: updates would be folded along the "
        f"wrong direction, without weight decay, and vectors never redrawn. {INSTEAD}; or call "
        f"velora_torch.restore(model) before deepspeed.initialize"
    )
