"""Two baselines that add nothing to a model: train its head, or its biases and its head."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from velora_torch.adapters.attach import check_bare, freeze
from velora_torch.heads import find_head, head_or_task_head, named_head

ModelT = TypeVar("ModelT", bound=nn.Module)


def linear_probe(model: ModelT, head: list[str] | None = None) -> ModelT:
    """Freeze everything but the head, in place.

    Args:
        model: any module.
        head: names of the modules that train; ``None`` finds them (:func:`find_head`).

    Returns:
        The same model.

    Raises:
        ValueError: no head is found or named, or the model has adapters or is compressed.
    """
    check_bare(model)
    names = find_head(model) if head is None else named_head(model, head)
    if not names:
        raise ValueError("linear_probe trains the head alone, and head=[] names none")
    freeze(model, names)
    return model


def bitfit(model: ModelT, head: list[str] | None = None) -> ModelT:
    """Freeze everything but biases and the head, in place (BitFit, Ben Zaken et al. 2022).

    Args:
        model: any module.
        head: names of the modules that train whole; ``None`` finds a task's head, and trains none
            in a language model.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no biases, or as :func:`linear_probe`.
    """
    check_bare(model)
    names = head_or_task_head(model, head)
    biases = [p for name, p in model.named_parameters() if _is_bias(name)]
    if not biases:
        raise ValueError(
            f"this {type(model).__name__} has no biases, so BitFit has nothing to train; use "
            f"add_ssf(model, shift=True), which adds them, or another method"
        )
    freeze(model, names)
    for bias in biases:
        bias.requires_grad_(True)
    return model


def _is_bias(name: str) -> bool:
    """Also ``in_proj_bias`` of ``nn.MultiheadAttention`` and timm's ``q_bias``."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")
