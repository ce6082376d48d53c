"""Watching every optimizer's step, so that users need to call nothing.

torch runs global hooks before and after any optimizer's ``step``. Before: refuse what would not
be exact, and turn first moments to new vectors. After: fold the coefficients that were updated.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from velora_torch.integrations.deepspeed import check_parameters
from velora_torch.layers.base import CompressedLayer
from velora_torch.layers.watching import LIVE
from velora_torch.optimizers import Group, Rule, check_group, rule_for, settings, turn_moments
from velora_torch.values import has_values

Trained = list[tuple[CompressedLayer, Group]]

_RETIRED: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
"""Coefficients of restored layers: an optimizer that still holds one trains nothing."""

_AWAITED: weakref.WeakSet[CompressedLayer] = weakref.WeakSet()
"""Layers of a step that has begun. A ``step`` that calls ``super().step()`` runs the hooks twice:
the first to end handles the layers, and a weight must not decay twice."""


@functools.cache
def watch() -> None:
    """Install the two global hooks, once in a process."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def retire(coef: nn.Parameter) -> None:
    """Remember coefficients whose layer is plain again."""
    _RETIRED[id(coef)] = coef


def _trained(optimizer: Optimizer) -> Trained:
    """Compressed layers whose coefficients (or dense-gradient weight) the optimizer holds."""
    layers = {id(_what_trains(layer)): layer for layer in LIVE}
    return [
        (layers[id(p)], group)
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in layers
    ]


def _what_trains(layer: CompressedLayer) -> nn.Parameter:
    coef = layer._parameters["coef"]
    return layer.raw_weight if coef is None else coef


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not LIVE and not _RETIRED:
        return None
    trained = _trained(optimizer)
    if not trained:  # ZeRO's holds flat copies
        check_parameters((layer.velora.name, _what_trains(layer)) for layer in LIVE)
    _check_holdings(optimizer, {id(layer) for layer, _ in trained})
    factored = [(layer, group) for layer, group in trained if layer._parameters["coef"] is not None]
    if factored:
        rule = rule_for(optimizer)
        for layer, group in factored:
            check_group(rule, optimizer, settings(optimizer, layer.coef, group))
        for layer, _ in factored:
            _check_direction(layer, rule)
    _AWAITED.update(layer for layer, _ in trained)
    if not factored:  # dense gradients alone: the optimizer needs nothing of us
        _check_first_draws([layer for layer, _ in trained])
        return None
    if len(args) > 1 and callable(args[1]):
        closure = _then_prepare(args[1], rule, optimizer, factored)
        return (args[0], closure, *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        closure = _then_prepare(kwargs["closure"], rule, optimizer, factored)
        return args, {**kwargs, "closure": closure}
    _prepare(rule, optimizer, factored)
    return None


def _then_prepare(closure: Any, rule: Rule, optimizer: Optimizer, factored: Trained) -> Any:
    """The closure, which makes the gradients (and may draw vectors), and then what follows it."""

    @functools.wraps(closure)
    def closure_and_prepare(*args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        _prepare(rule, optimizer, factored)
        return loss

    return closure_and_prepare


def _prepare(rule: Rule, optimizer: Optimizer, factored: Trained) -> None:
    """Bring first moments to the vectors that the gradients were made with."""
    _check_first_draws([layer for layer, _ in factored])
    for layer, _ in factored:
        if layer.velora_turn is not None and layer.coef.grad is not None:
            assert layer.velora_sign_turn is not None
            turn_moments(rule, optimizer, layer.coef, layer.velora_turn, layer.velora_sign_turn)
            layer.velora_turn = layer.velora_sign_turn = None


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    trained = [(layer, group) for layer, group in _trained(optimizer) if layer in _AWAITED]
    if not trained:
        return
    _AWAITED.difference_update([layer for layer, _ in trained])
    if _skipped(optimizer):
        return
    rule = None
    for layer, group in trained:
        coef = layer._parameters["coef"]
        if coef is None:
            if layer.raw_weight.grad is not None:
                layer.after_step("v")
        elif coef.grad is not None or coef._version != layer._seen:
            rule = rule or rule_for(optimizer)
            layer.after_step(rule.direction, rule.decay(settings(optimizer, coef, group)))


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused step under GradScaler did nothing: one look at the device."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.any())


def _check_holdings(optimizer: Optimizer, trained: set[int]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(key in held for key in list(_RETIRED)):
        raise ValueError(
            "VeLoRA: this optimizer holds coefficients of a model that was restored, so it would "
            "train nothing. Build the optimizer after velora_torch.restore(model)."
        )
    for layer in LIVE:
        untrained = id(layer) not in trained and layer._parameters["coef"] is not None
        if untrained and id(layer.raw_weight) in held and layer.coef.requires_grad:
            raise ValueError(
                f"VeLoRA: this optimizer was built before velora_torch.compress: it holds the "
                f"weight of layer {layer.velora.name!r}, which is frozen now, and not the "
                f"coefficients that train it. Build the optimizer after compress."
            )


def _check_direction(layer: CompressedLayer, rule: Rule) -> None:
    state = layer.velora
    layer.settle()
    if not state.pending or state.direction == rule.direction:
        return
    layer.collect()
    if state.pending and state.config.fold_every is None:
        instead = (
            "Call velora_torch.fold(model) first."
            if layer.foldable
            else "Its weight is quantised, and nothing can be folded into it: go on with an "
            "optimizer of the first kind."
        )
        raise ValueError(
            f"VeLoRA: layer {state.name!r} has pending coefficients along {state.direction}, and "
            f"this optimizer updates along {rule.direction}. {instead}"
        )
    layer.fold_all()


def _check_first_draws(layers: list[CompressedLayer]) -> None:
    """Warn about first batches that gave no direction: one look at the device, once in a run."""
    flags = [(layer, layer.take_unchecked()) for layer in layers]
    bad = [
        layer for layer, flag in flags if flag is not None and has_values(flag) and not bool(flag)
    ]
    if not bad:
        return
    for layer in bad:
        layer.draw_again()
    names = ", ".join(repr(layer.velora.name) for layer in bad[:3])
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    warnings.warn(
        f"VeLoRA: the first batch gave no direction for {names}{more}: its input was all zero or "
        f"not finite. These layers use equal entries for now and choose vectors at the next batch.",
        stacklevel=2,
    )
