"""Compress, fold and restore whole models."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from velora_torch.config import VeloraConfig
from velora_torch.layers import CompressedLayer, compressed_class
from velora_torch.selection import select
from velora_torch.stepping import retire, watch

ModelT = TypeVar("ModelT", bound=nn.Module)


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers of a model by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLayer)}


def compress(model: ModelT, config: VeloraConfig | None = None) -> ModelT:
    """Compress layers of a model in place: do this before building the optimizer.

    Forward outputs, input gradients, module names, hooks and ``state_dict`` keys stay what they
    were. Each compressed layer gets a trainable ``coef`` (O x G) and its weight is frozen; after
    every step of a torch optimizer the coefficients are folded into the weight.

    Args:
        model: any module.
        config: what to compress and how; defaults to ``VeloraConfig()``.

    Returns:
        The same model.

    Raises:
        ValueError: the model is compressed already, a target matches nothing, or nothing can be
            compressed. The model is then unchanged.
    """
    config = VeloraConfig() if config is None else config
    if not isinstance(config, VeloraConfig):
        raise TypeError(f"config must be a VeloraConfig, got {type(config).__name__}")
    already = compressed_layers(model)
    if already:
        raise ValueError(
            f"this model is compressed already ({len(already)} layers, the first is "
            f"{next(iter(already))!r}); call velora_torch.restore(model) first"
        )
    watch()
    for layer in select(model, config).chosen:
        module = layer.module
        module.__class__ = compressed_class(type(module))
        assert isinstance(module, CompressedLayer)
        module.start(layer.name, layer.groups, layer.size, config)
    return model


def fold(model: ModelT) -> ModelT:
    """Merge pending coefficients into the weights; does nothing where none are pending."""
    for layer in compressed_layers(model).values():
        layer.settle()
        if layer.velora.pending:
            layer.fold()
    return model


def restore(model: ModelT) -> ModelT:
    """Make every layer plain again, with all updates in its weight.

    Nothing of velora is left in the model. Weights train again, so build a new optimizer.
    """
    fold(model)
    for layer in compressed_layers(model).values():
        coef = layer._parameters["coef"]
        plain = layer.plain_class
        layer.stop()
        layer.__class__ = plain  # type: ignore[assignment]
        if coef is not None:
            retire(coef)
    return model
