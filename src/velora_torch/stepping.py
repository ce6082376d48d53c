"""Watching every optimizer's step, so that users need to call nothing.

torch runs global hooks before and after any optimizer's ``step``. Before: refuse what would not
be exact, and turn first moments to new vectors. After: fold the coefficients that were updated.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from velora_torch.integrations import deepspeed
from velora_torch.layers.base import CompressedLayer
from velora_torch.layers.watching import LIVE
from velora_torch.optimizers import Group, Rule, check_group, rule_for, settings, turn_moments
from velora_torch.values import has_values

Trained = list[tuple[CompressedLayer, Group]]
Parts = Iterable[tuple[Iterable[Tensor], Group]]
"""What is stepped, and with which settings."""

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
    deepspeed.watch_steps(_before_zero, _after_zero)
    deepspeed.watch_copies(_refuse_copies)


def retire(coef: nn.Parameter) -> None:
    """Remember coefficients whose layer is plain again."""
    _RETIRED[id(coef)] = coef


def _parts(optimizer: Optimizer) -> Parts:
    return [(group["params"], group) for group in optimizer.param_groups]


def _trained(parts: Parts) -> Trained:
    """Compressed layers whose coefficients (or dense-gradient weight) are stepped."""
    layers = {id(_what_trains(layer)): layer for layer in LIVE}
    return [(layers[id(p)], group) for params, group in parts for p in params if id(p) in layers]


def _what_trains(layer: CompressedLayer) -> nn.Parameter:
    coef = layer._parameters["coef"]
    return layer.raw_weight if coef is None else coef


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not LIVE and not _RETIRED:
        return None
    if deepspeed.is_followed(optimizer):
        return None
    trained = _trained(_parts(optimizer))
    if not trained:
        _refuse_copies([filter(deepspeed.is_taken, map(_what_trains, LIVE))])
    rule, factored = _check(optimizer, _parts(optimizer), trained)
    _AWAITED.update(layer for layer, _ in trained)
    if rule is None:  # dense gradients alone: the optimizer needs nothing of us
        _check_first_draws([layer for layer, _ in trained])
        return None
    turn = functools.partial(turn_moments, rule, optimizer)
    prepare = functools.partial(_prepare, factored, turn)
    if len(args) > 1 and callable(args[1]):
        closure = _then_prepare(args[1], prepare)
        return (args[0], closure, *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        closure = _then_prepare(kwargs["closure"], prepare)
        return args, {**kwargs, "closure": closure}
    prepare()
    return None


def _check(optimizer: Optimizer, parts: Parts, trained: Trained) -> tuple[Rule | None, Trained]:
    """Refuse what would not be exact; the rule, and the layers that it concerns."""
    _check_holdings(parts, {id(layer) for layer, _ in trained})
    factored = [(layer, group) for layer, group in trained if layer._parameters["coef"] is not None]
    if not factored:
        return None, []
    rule = rule_for(optimizer)
    for layer, group in factored:
        check_group(rule, optimizer, settings(optimizer, layer.coef, group))
    for layer, _ in factored:
        _check_direction(layer, rule)
    return rule, factored


def _then_prepare(closure: Any, prepare: Callable[[], None]) -> Any:
    """The closure, which makes the gradients (and may draw vectors), and then what follows it."""

    @functools.wraps(closure)
    def closure_and_prepare(*args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        prepare()
        return loss

    return closure_and_prepare


def _prepare(
    factored: Trained, turn: Callable[[Tensor, Tensor, Tensor], None], always: bool = False
) -> None:
    """Bring first moments to the vectors that the gradients were made with.

    Args:
        factored: what is stepped.
        turn: turns the moments of coefficients; their cosines with v, and those with its sign.
        always: also of coefficients that show no gradient.
    """
    _check_first_draws([layer for layer, _ in factored])
    for layer, _ in factored:
        if layer.velora_turn is not None and (always or layer.coef.grad is not None):
            assert layer.velora_sign_turn is not None
            turn(layer.coef, layer.velora_turn, layer.velora_sign_turn)
            layer.velora_turn = layer.velora_sign_turn = None


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    trained = _trained(_parts(optimizer))
    trained = [(layer, group) for layer, group in trained if layer in _AWAITED]
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


def _before_zero(zero: Any) -> None:
    """As before a step; ZeRO has taken the gradients away already."""
    if not LIVE and not _RETIRED:
        return
    parts = deepspeed.parts(zero)
    trained = _trained(parts)
    rule, factored = _check(zero.optimizer, parts, trained)
    if rule is None:
        _check_first_draws([layer for layer, _ in trained])
    else:
        _prepare(factored, functools.partial(deepspeed.turn_moments, zero, rule), always=True)


def _after_zero(zero: Any) -> None:
    """Fold at every step: each process zeroes its piece of the float32 copies, all together."""
    rule = None
    for layer, group in _trained(deepspeed.parts(zero)):
        if layer._parameters["coef"] is None:
            layer.after_step("v")
            continue
        rule = rule or rule_for(zero.optimizer)
        layer.after_step(rule.direction, rule.decay(group))
        if layer.velora.pending and layer.velora.config.fold_every is not None:
            layer.fold()


def _refuse_copies(held: Iterable[Iterable[Tensor]]) -> None:
    """Refuse parameters of which DeepSpeed steps copies, if they train compressed layers."""
    for layer, _ in _trained((parameters, {}) for parameters in held):
        deepspeed.refuse(layer.velora.name)


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused step under GradScaler did nothing: one look at the device."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.any())


def _check_holdings(parts: Parts, trained: set[int]) -> None:
    held = {id(p) for params, _ in parts for p in params}
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
