"""The optimizers that a recipe may name, and those of them that transformers does not know."""

from __future__ import annotations

import difflib
import re
from typing import Any

from torch import nn
from torch.optim import Optimizer

from velora_torch.training.recipe import RecipeError
from velora_torch.training.sections import TrainSection

OWN_OPTIMIZERS = ("flora",)
"""Names that `train.optimizer` takes besides those of transformers."""
COMMON = ("adamw_torch", "adamw_torch_fused")
"""Names that need no asking: importing transformers' list takes longer than most checks."""
SETTINGS = ("rank", "update_proj_gap", "seed")


class OptimizerError(ValueError):
    """An optimizer can't be made with the settings of a recipe."""


def check_optimizer(train: TrainSection) -> None:
    """See that there is such an optimizer.

    Raises:
        RecipeError: there is none; names the nearest.
        OptimizerError: it is one of `OWN_OPTIMIZERS`, and lacks settings or has others.
    """
    if train.optimizer in OWN_OPTIMIZERS:
        check_own_optimizer(train)
        return
    if train.optimizer in COMMON:
        return
    from transformers.training_args import OptimizerNames

    names = [*OWN_OPTIMIZERS, *(name.value for name in OptimizerNames)]
    if train.optimizer not in names:
        near = difflib.get_close_matches(train.optimizer, names, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(names)}"
        raise RecipeError(
            f"`train.optimizer` is {train.optimizer!r}, which is none of transformers' "
            f"optimizer names{hint}"
        )


def check_own_optimizer(train: TrainSection) -> None:
    """Raise `OptimizerError` for settings that the optimizer does not have."""
    unknown = [name for name in train.optimizer_settings if name not in SETTINGS]
    if unknown:
        raise OptimizerError(
            f"train.optimizer_settings: {train.optimizer} has no setting {unknown[0]!r}; there "
            f"are: {', '.join(SETTINGS)}"
        )
    if "rank" not in train.optimizer_settings:
        raise OptimizerError(
            f"train.optimizer_settings: {train.optimizer} needs rank, such as {{rank: 64}}"
        )


def own_optimizer(model: nn.Module, train: TrainSection, decayed: list[str]) -> Optimizer:
    """An optimizer of `OWN_OPTIMIZERS` over a model's trainable parameters.

    Args:
        model: what trains.
        train: names the optimizer, its targets (all linear layers by default) and its settings.
        decayed: names of the parameters with weight decay.
    """
    from velora_torch.peers.flora import Flora

    check_own_optimizer(train)
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _is_target(name, train.optimizer_targets)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((name in matrices, name in decayed), []).append(p)
    parts: list[dict[str, Any]] = []
    for (compressed, decays), params in groups.items():
        settings = train.optimizer_settings if compressed else {}
        decay = train.weight_decay if decays else 0.0
        parts.append({"params": params, "weight_decay": decay, **settings})
    beta1, beta2 = train.betas
    return Flora(parts, lr=train.learning_rate, betas=(beta1, beta2), eps=train.eps)


def _is_target(name: str, targets: str | list[str] | None) -> bool:
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(target in name for target in targets)  # as transformers does for its own
