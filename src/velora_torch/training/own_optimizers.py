"""The optimizers that a recipe may name: those that transformers does not know, and what it drops.

Transformers gives GaLore none of betas, eps and weight decay, APOLLO's projected weights no decay
and its others none of the three, and neither of them a setting that it does not know, silently.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from torch import nn
from torch.optim import Optimizer

from velora_torch.adapters.targets import is_leaf_linear
from velora_torch.integrations.bitsandbytes import clip_nothing
from velora_torch.layers.conv1d import CompressedConv1D
from velora_torch.training.recipe import RecipeError
from velora_torch.training.sections import TrainSection

OWN_OPTIMIZERS = ("flora",)
"""Names that `train.optimizer` takes besides those of transformers."""
COMMON = ("adamw_torch", "adamw_torch_fused")
"""Names that need no asking: importing transformers' list takes longer than most checks."""
LAYERWISE = "_layerwise"
_LOW_RANK = ("rank", "update_proj_gap", "scale", "proj_type", "eps")
SETTINGS = {
    "flora": ("rank", "update_proj_gap", "seed"),
    "galore": _LOW_RANK,
    "apollo": (*_LOW_RANK, "proj", "scale_type"),
}
"""Settings of optimizers whose names begin so; `eps` is that of the projected weights alone."""
SIDES = ("std", "reverse_std", "left", "right", "full")
WORDS = {"proj": ("random", "svd"), "scale_type": ("channel", "tensor"), "proj_type": SIDES}
"""What settings that are words may be."""
COUNTS = ("rank", "update_proj_gap")


class OptimizerError(ValueError):
    """An optimizer can't be made with the settings of a recipe."""


def check_optimizer(train: TrainSection) -> None:
    """See that there is such an optimizer.

    Raises:
        RecipeError: there is none; names the nearest.
        OptimizerError: it lacks settings, or has others than its own.
    """
    check_settings(train)
    if train.optimizer in (*OWN_OPTIMIZERS, *COMMON):
        return
    if train.optimizer.endswith(LAYERWISE):
        raise OptimizerError(
            f"train.optimizer: {train.optimizer} steps inside of the backward pass, where neither "
            "the schedule, clipping, rates of layers nor a resumed run reach it; use "
            f"{train.optimizer.removesuffix(LAYERWISE)}"
        )
    from transformers.training_args import OptimizerNames

    names = [*OWN_OPTIMIZERS, *(name.value for name in OptimizerNames)]
    if train.optimizer not in names:
        near = difflib.get_close_matches(train.optimizer, names, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(names)}"
        raise RecipeError(
            f"`train.optimizer` is {train.optimizer!r}, which is none of transformers' "
            f"optimizer names{hint}"
        )


def check_settings(train: TrainSection) -> None:
    """Raise `OptimizerError` for settings that a low-rank optimizer does not have, or needs."""
    kind = train.optimizer.partition("_")[0]
    if kind in SETTINGS:
        is_adam = "adafactor" not in train.optimizer
        known = [name for name in SETTINGS[kind] if is_adam or name != "eps"]
        unknown = [name for name in train.optimizer_settings if name not in known]
        if unknown:
            raise OptimizerError(
                f"train.optimizer_settings: {train.optimizer} has no setting {unknown[0]!r}; "
                f"there are: {', '.join(known)}"
            )
        for name, value in train.optimizer_settings.items():
            _check_value(name, value)
    if train.optimizer in OWN_OPTIMIZERS and "rank" not in train.optimizer_settings:
        raise OptimizerError(
            f"train.optimizer_settings: {train.optimizer} needs rank, such as {{rank: 64}}"
        )


def _check_value(name: str, value: float | str) -> None:
    if name in WORDS:
        fits, wanted = value in WORDS[name], f"one of {', '.join(WORDS[name])}"
    elif name in COUNTS:
        fits, wanted = isinstance(value, int) and value >= 1, "a whole number, at least 1"
    elif name == "seed":
        fits, wanted = isinstance(value, int) and value >= 0, "a whole number, at least 0"
    else:
        fits, wanted = not isinstance(value, str) and value > 0, "a number above 0, such as 1.0e-8"
    if not fits:
        raise OptimizerError(f"train.optimizer_settings.{name} is {value!r}; it has to be {wanted}")


def own_optimizer(model: nn.Module, train: TrainSection, decayed: list[str]) -> Optimizer:
    """An optimizer of `OWN_OPTIMIZERS` over a model's trainable parameters.

    Args:
        model: what trains.
        train: names the optimizer, its targets (all linear layers by default, GPT-2's ``Conv1D``
            among them) and its settings.
        decayed: names of the parameters with weight decay.

    Raises:
        OptimizerError: there is no weight to project.
    """
    from velora_torch.peers.flora import Flora

    check_settings(train)
    matrices = _projected(model, train)
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


def give_settings(
    optimizer: Optimizer, model: nn.Module, train: TrainSection, decayed: list[str]
) -> None:
    """Give all groups of transformers' GaLore or APOLLO a recipe's betas, eps and weight decay.

    Args:
        optimizer: the one that transformers made.
        model: what it trains.
        train: the settings.
        decayed: names of the parameters with weight decay.

    Raises:
        OptimizerError: nothing of what trains is projected.
    """
    projected = [p for group in optimizer.param_groups if "rank" in group for p in group["params"]]
    if not any(p.requires_grad for p in projected):
        raise OptimizerError(
            f"train.optimizer: {train.optimizer} would project nothing that trains, since no "
            "nn.Linear among train.optimizer_targets trains its weight (compressed ones train "
            "coefficients, unless gradient: dense; a head that is tied to an embedding is that); "
            "use adamw_torch"
        )
    clip_nothing(optimizer)
    named = set(decayed)
    decaying = {id(p) for name, p in model.named_parameters() if name in named}
    for group in list(optimizer.param_groups):
        if "betas" in group:  # GaLore's Adafactor has none, and two eps of another kind
            own = train.optimizer_settings.get("eps") if "rank" in group else None
            group["betas"] = tuple(train.betas)
            group["eps"] = float(train.eps if own is None else own)
        group["weight_decay"] = 0.0
        decays = [p for p in group["params"] if id(p) in decaying]
        if train.weight_decay and decays:
            group["params"] = [p for p in group["params"] if id(p) not in decaying]
            other = {**group, "params": decays, "weight_decay": train.weight_decay}
            optimizer.param_groups.append(other)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _projected(model: nn.Module, train: TrainSection) -> set[str]:
    """Names of the weights that the optimizer projects."""
    # What a compressed layer trains is another parameter, and a head tied to an embedding is that.
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    linear = [
        name
        for name, module in model.named_modules()
        if (is_leaf_linear(module) or isinstance(module, CompressedConv1D))
        and f"{name}.weight" in trained
    ]
    if not linear:
        raise OptimizerError(
            f"train.optimizer: {train.optimizer} has no weight to project, since no linear layer "
            "trains its weight (compressed ones train coefficients, unless gradient: dense); use "
            "adamw_torch"
        )
    chosen = {f"{name}.weight" for name in linear if _is_target(name, train.optimizer_targets)}
    if not chosen:
        raise OptimizerError(
            f"train.optimizer_targets: {train.optimizer_targets!r} matches none of the "
            f"{len(linear)} linear layers that train their weight, such as "
            f"{', '.join(linear[:3])}; a regular expression has to match the whole name"
        )
    return chosen


def _is_target(name: str, targets: str | list[str] | None) -> bool:
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(target in name for target in targets)  # as transformers does for its own
