"""Which modules get an adapter."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Sequence

from torch import nn

from velora_torch.config import VeloraConfig
from velora_torch.layers.conv1d import is_conv1d
from velora_torch.selection import _targeted

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""A regular expression, names (or runs of components of names), or a function, as in
:class:`velora_torch.VeloraConfig`; or the word that stands for every module of the right kind."""

USE_WEIGHTS_ALONE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""They use the weights of their children without calling them (the latter in evaluation)."""


def choose(
    model: nn.Module,
    targets: Targets,
    everything: str,
    is_kind: Callable[[str, nn.Module], bool],
    left_out: Collection[str],
) -> dict[str, nn.Module]:
    """The modules to adapt, by name.

    Args:
        model: the model.
        targets: which modules.
        everything: the value of ``targets`` that means all of them.
        is_kind: whether a module, by its full name, is of the kind that can be adapted.
        left_out: modules that stay plain, with all that is in them.

    Raises:
        ValueError: a target matches nothing (with near misses), or only what cannot be adapted.
    """
    reasons: dict[str, str] = {}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not is_kind(name, module):
            continue
        reason = _why_not(name, module, model, left_out)
        if reason is None:
            found[name] = module
        else:
            reasons[name] = reason
    if targets != everything:
        modules = {name: model.get_submodule(name) for name in [*found, *reasons]}
        wanted, unmatched = _targeted(modules, VeloraConfig(targets=targets))
        if unmatched:
            raise ValueError(_no_match(unmatched[0], found))
        found = {name: module for name, module in found.items() if name in wanted}
        reasons = {name: why for name, why in reasons.items() if name in wanted}
    if not found:
        listed = "".join(f"\n  {name}: {why}" for name, why in list(reasons.items())[:8])
        raise ValueError(
            f"targets={targets!r} leaves nothing to adapt in this {type(model).__name__}{listed}"
        )
    return found


def is_leaf_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _why_not(
    name: str, module: nn.Module, model: nn.Module, left_out: Collection[str]
) -> str | None:
    if any(f"{name}.".startswith(f"{head}.") for head in left_out):
        return "part of the head, which stays plain"
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, USE_WEIGHTS_ALONE):
        return f"nn.{type(parent).__name__} uses its weight without calling it"
    return None


def _no_match(target: str, found: Collection[str]) -> str:
    depth = target.count(".") + 1
    ends = sorted({".".join(name.split(".")[-depth:]) for name in found})
    near = difflib.get_close_matches(re.sub(r"^\W+", "", target), ends, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    last = sorted({name.rpartition(".")[2] for name in found})
    known = ", ".join(last[:16]) or "none"
    return f"target {target!r} matches no module that can be adapted{hint}. There are: {known}"
