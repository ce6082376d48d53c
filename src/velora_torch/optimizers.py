"""Which optimizers train coefficients exactly, and how their update is folded.

On the factor C, with dW = C v and unit v, an optimizer gives the dense run's weight change if it is

* linear in the gradient (SGD, momentum): fold along v;
* elementwise and scale-invariant (Adam and its kin, up to eps): every entry of a column of C
  is scaled by |v[m]|, which cancels, so fold along sign(v).

Everything else is refused by name before its first step. The rule says which state entries are
first moments of the gradient, since those turn with new vectors, while second moments are kept.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from velora_torch.sharding import block_of, local

Group = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """How one optimizer class acts on coefficients."""

    direction: str
    """``v`` (linear) or ``sign`` (scale-invariant)."""

    moments: tuple[str, ...] = ()
    """State entries that are first moments of the gradient: multiples of v."""

    sign_moments: tuple[str, ...] = ()
    """State entries that are sums of normalised updates: multiples of sign(v)."""

    refuse: Callable[[Group], str | None] = lambda group: None
    """Why a parameter group's settings are not exact on coefficients, if so."""

    decoupled: Callable[[Group], bool] = lambda group: False
    """Whether weight decay multiplies the weight by 1 - lr * weight_decay."""

    def decay(self, group: Group) -> float | Tensor:
        """1 - lr * weight_decay of the step just made."""
        weight_decay = group.get("weight_decay", 0.0)
        if not weight_decay or not self.decoupled(group):
            return 1.0
        decay: float | Tensor = 1.0 - group["lr"] * weight_decay
        return decay


def _coupled(group: Group) -> str | None:
    if group.get("weight_decay", 0.0):
        return (
            f"its weight decay ({group['weight_decay']}) is added to the gradient, which is then "
            f"no longer a factor; use weight_decay=0, or AdamW, whose decay is decoupled"
        )
    return None


def _adam(group: Group) -> str | None:
    return None if group.get("decoupled_weight_decay") else _coupled(group)


def _sgd(group: Group) -> str | None:
    return _coupled(group) if group.get("momentum", 0.0) else None


def _adagrad(group: Group) -> str | None:
    if group.get("initial_accumulator_value", 0.0):
        return "initial_accumulator_value is not scale-invariant; use 0"
    return _coupled(group)


def _ranked(group: Group) -> str | None:
    if group.get("rank") is not None:
        return "it projects their gradient; leave them out of the group with a rank"
    return None


def _always(group: Group) -> bool:
    return True


def _if_decoupled(group: Group) -> bool:
    return bool(group.get("decoupled_weight_decay"))


_TORCH: dict[type[Optimizer], Rule] = {
    torch.optim.SGD: Rule("v", ("momentum_buffer",), refuse=_sgd, decoupled=_always),
    torch.optim.Adam: Rule("sign", ("exp_avg",), refuse=_adam, decoupled=_if_decoupled),
    torch.optim.AdamW: Rule("sign", ("exp_avg",), decoupled=_always),
    torch.optim.NAdam: Rule("sign", ("exp_avg",), refuse=_adam, decoupled=_if_decoupled),
    torch.optim.Adamax: Rule("sign", ("exp_avg",), refuse=_coupled),
    torch.optim.RMSprop: Rule("sign", ("grad_avg",), ("momentum_buffer",), refuse=_coupled),
    torch.optim.Adagrad: Rule("sign", refuse=_adagrad),
}

LOW_RANK = Rule("sign", ("exp_avg",), refuse=_ranked, decoupled=_always)
"""Optimizers that project the gradients of groups with a ``rank`` (GaLore, APOLLO, FLoRA) and are
AdamW to every other group."""

_LOW_RANK_MODULES = ("galore_torch.adamw", "apollo_torch.adamw", "apollo_torch.apollo")

# bitsandbytes keeps one class per storage format; what it computes is its `optimizer_name`.
_BITSANDBYTES = {
    "adam": Rule("sign", ("state1",), decoupled=_always),
    "lion": Rule("sign", ("state1",), decoupled=_always),
    "momentum": Rule("v", ("state1",), refuse=_coupled),
    "rmsprop": Rule("sign", refuse=_coupled),
    "adagrad": Rule("sign", refuse=_coupled),
}

EXACT = (
    "SGD, Adam, AdamW, NAdam, Adamax, RMSprop, Adagrad, bitsandbytes' Adam, AdamW and Lion, "
    "DeepSpeed's FusedAdam and DeepSpeedCPUAdam, and the AdamW of GaLore and APOLLO"
)

_ADVICE = {
    "Adafactor": "it factors second moments over whole rows and columns of the gradient",
    "Muon": "it orthogonalises the whole update",
    "LAMB": "it scales the update by the norm of the weight",
    "LARS": "it scales the update by the norm of the weight",
    "LBFGS": "it evaluates the loss several times in a step",
    "RAdam": "its first steps are linear in the gradient and later ones are not",
    "Adadelta": "its step size comes from eps, which is not scale-invariant",
}

_registered: dict[type[Optimizer], Rule] = {}


def register(kind: type[Optimizer], rule: Rule) -> None:
    """Vouch for an optimizer class of your own: its updates are folded by ``rule``.

    Its ``step`` must change the coefficients once, as an elementwise function of their gradient
    and of its state that is linear (``Rule("v")``) or scale-invariant (``Rule("sign")``), and must
    not look at the coefficients' own values, which are zero after every fold.
    """
    _registered[kind] = rule


def _same_step(kind: type[Optimizer], known: type[Optimizer]) -> bool:
    return inspect.unwrap(kind.step) is inspect.unwrap(known.step)


def rule_for(optimizer: Optimizer) -> Rule:
    """The rule of an optimizer.

    Raises:
        ValueError: its updates of coefficients would not be those of the dense gradient.
    """
    kind = type(optimizer)
    for base in kind.__mro__:
        if base in _registered:
            return _registered[base]
    for known, rule in _TORCH.items():
        if isinstance(optimizer, known) and _same_step(kind, known):
            return rule
    name = kind.__name__
    if is_bitsandbytes(optimizer):
        from velora_torch.integrations.bitsandbytes import algorithm

        name = algorithm(optimizer) or name
        if name in _BITSANDBYTES:
            return _BITSANDBYTES[name]
    if kind.__module__.startswith("deepspeed.ops.adam."):  # its kernels of torch's Adam and AdamW
        return _TORCH[torch.optim.AdamW if optimizer.adam_w_mode else torch.optim.Adam]  # type: ignore[attr-defined]
    if any(_is_low_rank(base) and _same_step(kind, base) for base in kind.__mro__):
        return LOW_RANK
    why = _why_refused(optimizer, name)
    raise ValueError(
        f"VeLoRA: {kind.__name__} on coefficients would not give the weight change of the dense "
        f"gradient{f' ({why})' if why else ''}. Exact are: {EXACT}. Use one of them, or compress "
        f"with gradient='dense', or, if you know that yours is linear or scale-invariant, say so "
        f"with velora_torch.optimizers.register(...)"
    )


def _is_low_rank(kind: type) -> bool:
    return kind.__module__ in _LOW_RANK_MODULES and kind.__name__ == "AdamW"


def _why_refused(optimizer: Optimizer, name: str) -> str | None:
    for part, reason in _ADVICE.items():
        if part.lower() in name.lower():
            return reason
    known = next((base for base in type(optimizer).__mro__ if base in _TORCH), None)
    return f"it changes the step of {known.__name__}" if known else None


def is_bitsandbytes(optimizer: Optimizer) -> bool:
    """Whether bitsandbytes made the optimizer's class; does not import it."""
    loaded = sys.modules.get("bitsandbytes.optim.optimizer")
    return loaded is not None and isinstance(optimizer, loaded.Optimizer8bit)


def settings(optimizer: Optimizer, parameter: Tensor, group: Group) -> Group:
    """The settings that a parameter is updated with: its group's, or its own in bitsandbytes."""
    if not is_bitsandbytes(optimizer):
        return group
    from velora_torch.integrations.bitsandbytes import overrides

    return {**group, **overrides(optimizer, parameter)}


def check_group(rule: Rule, optimizer: Optimizer, group: Group) -> None:
    """Refuse settings of a parameter group that are not exact on coefficients.

    Raises:
        ValueError: names the optimizer, the setting, and what to use instead.
    """
    reason = rule.refuse(group)
    if reason is None and is_bitsandbytes(optimizer) and group.get("max_unorm", 0.0):
        reason = "max_unorm scales the update by the norm of the weight; use 0"
    if reason is not None:
        raise ValueError(f"VeLoRA: {type(optimizer).__name__} on coefficients: {reason}")


@torch.no_grad()
def turn_moments(
    rule: Rule, optimizer: Optimizer, coef: Tensor, turn_G: Tensor, sign_turn_G: Tensor
) -> None:
    """Project first moments on new vectors: multiply column g by the cosine of its turn."""
    state = optimizer.state.get(coef)
    if not state:
        return
    for names, factor in ((rule.moments, turn_G), (rule.sign_moments, sign_turn_G)):
        for name in names:
            moment = state.get(name)
            if moment is None:
                continue
            if moment.dtype == torch.uint8:
                from velora_torch.integrations.bitsandbytes import scale_quantised_

                scale_quantised_(state, name, factor)
            else:
                part, column = local(moment), block_of(moment).column
                part.mul_(factor[column : column + part.shape[1]].to(moment.dtype))
