"""What of a model trains: one function for every method that a recipe can name.

The methods are functions from a loaded model to the model that trains. PEFT makes its own
adapters; SSF, Hydra, linear probing and BitFit are in `velora_torch.adapters`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from velora_torch.adapters import add_hydra, add_ssf, bitfit, find_head, linear_probe
from velora_torch.training.schema import PEFT_METHODS, Recipe


class MethodError(ValueError):
    """A method cannot be applied to a model as the recipe asks."""


def apply_method(model: Any, recipe: Recipe) -> Any:
    """Freeze and adapt a loaded model as the recipe's method says; not yet compressed.

    Args:
        model: as loaded, quantised where the recipe says so.
        recipe: names the method and has its section.

    Returns:
        The model to train: the same one, or PEFT's around it.

    Raises:
        MethodError: nothing to adapt, or names that match nothing.
    """
    if recipe.method == "full":
        return model
    method = _with_peft if recipe.method in PEFT_METHODS else METHODS[recipe.method]
    try:
        return method(model, recipe)
    except ValueError as error:
        raise MethodError(f"method: {recipe.method}: {error}") from None


def head_of(model: Any, recipe: Recipe) -> list[str] | None:
    """Names of the layers that the task has added, which always train; None for LMs."""
    if recipe.is_language_model:
        return None
    return find_head(model) if recipe.head is None else list(recipe.head)


def _linear_probe(model: Any, recipe: Recipe) -> Any:
    return linear_probe(model, head=recipe.head)


def _bitfit(model: Any, recipe: Recipe) -> Any:
    return bitfit(model, head=head_of(model, recipe) or [])


def _ssf(model: Any, recipe: Recipe) -> Any:
    return add_ssf(model, head=head_of(model, recipe) or [])


def _hydra(model: Any, recipe: Recipe) -> Any:
    section = recipe.hydra
    assert section is not None
    return add_hydra(
        model,
        rank=section.r,
        alpha=section.alpha,
        targets=section.targets,
        head=head_of(model, recipe) or [],
    )


def _coefficients(model: Any, recipe: Recipe) -> Any:
    """Freeze everything but the task's head: compress then gives frozen layers coefficients."""
    model.requires_grad_(False)
    for name in head_of(model, recipe) or []:
        model.get_submodule(name).requires_grad_(True)
    return model


METHODS: dict[str, Callable[[Any, Recipe], Any]] = {
    "linear-probe": _linear_probe,
    "bitfit": _bitfit,
    "ssf": _ssf,
    "hydra": _hydra,
    "coefficients": _coefficients,
}
"""Methods that need no PEFT."""


def _with_peft(model: Any, recipe: Recipe) -> Any:
    from peft import get_peft_model, prepare_model_for_kbit_training

    if recipe.method == "qlora":
        # Gradient checkpointing is the trainer's; embeddings' outputs need a gradient for it.
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=recipe.train.gradient_checkpointing is True
        )
    config = peft_config(model, recipe)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        assert recipe.lora is not None
        raise MethodError(f"lora.targets={recipe.lora.targets!r}: {error}") from None


def peft_config(model: Any, recipe: Recipe) -> Any:
    """PEFT's configuration of a recipe's adapters."""
    import peft

    lora = recipe.lora
    assert lora is not None
    shared: dict[str, Any] = {"target_modules": lora.targets}
    if recipe.is_language_model:
        shared["task_type"] = "CAUSAL_LM"
    if recipe.task == "pretrain":  # what starts random and gets no adapter trains as a whole
        shared["modules_to_save"] = _not_adapted(model, lora.targets)
    elif not recipe.is_language_model:
        shared["modules_to_save"] = head_of(model, recipe)
    if recipe.method == "ia3":
        if lora.targets == "all-linear":  # PEFT knows the usual layers of known models
            return peft.IA3Config(**shared | {"target_modules": None})
        return peft.IA3Config(feedforward_modules=[], **shared)
    if recipe.method == "adalora":
        total = _steps(recipe)
        return peft.AdaLoraConfig(
            init_r=lora.r,
            target_r=max(1, lora.r // 2),
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            total_step=total,
            tinit=total // 10,
            tfinal=total // 3,
            **shared,
        )
    if recipe.method == "loha":
        return peft.LoHaConfig(r=lora.r, alpha=lora.alpha, module_dropout=0.0, **shared)
    if recipe.method == "lokr":
        return peft.LoKrConfig(r=lora.r, alpha=lora.alpha, module_dropout=0.0, **shared)
    variants: dict[str, dict[str, Any]] = {
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa_niter_4"},
        "olora": {"init_lora_weights": "olora"},
    }
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        **shared,
        **variants.get(recipe.method, {}),
    )


def _not_adapted(model: Any, targets: str | list[str]) -> list[str]:
    """Names of all modules with weights of their own that get no adapter.

    Args:
        model: a causal language model.
        targets: as PEFT understands them.

    Raises:
        MethodError: the output head shares its weight with the embedding.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        raise MethodError(
            "the model's output head is its embedding, and PEFT would train two copies apart; "
            "set tie_word_embeddings to false in its config.json, or use method: full"
        )

    def adapted(name: str, module: nn.Module) -> bool:
        if targets == "all-linear":
            return isinstance(module, (nn.Linear, Conv1D)) and module is not head
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in targets)

    return [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None and not adapted(name, module)
    ]


def _steps(recipe: Recipe) -> int:
    """Steps of a run, which AdaLoRA's schedule needs beforehand."""
    if recipe.train.steps is None:
        raise MethodError("a schedule of ranks needs train.steps instead of train.epochs")
    return recipe.train.steps
