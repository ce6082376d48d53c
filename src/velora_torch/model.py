"""Compress, fold and restore whole models."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from velora_torch.choosing import choose_before_forwards, forget
from velora_torch.config import VeloraConfig
from velora_torch.integrations.bitsandbytes import keep_differentiable
from velora_torch.integrations.peft_watch import unwatch_adapters, watch_adapters
from velora_torch.layers import CompressedLayer, compressed_class, layer_kind
from velora_torch.layers.adapter import (
    AdapterState,
    CompressedAdapter,
    compressed_adapter_class,
    compressed_adapters,
)
from velora_torch.layers.quantized import CompressedQuantized, make_lean
from velora_torch.layers.state import TENSORS
from velora_torch.layers.watching import LIVE
from velora_torch.memory.freed import arm, disarm, foresee
from velora_torch.recomputation import undo_recompute
from velora_torch.selection import Chosen, ChosenAdapter, has_adapters, select
from velora_torch.sharding import is_sharded
from velora_torch.stepping import retire, watch

ModelT = TypeVar("ModelT", bound=nn.Module)

REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set")
"""What a module registers that compressing adds to."""


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers of a model by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLayer)}


def coefficients(model: nn.Module) -> list[nn.Parameter]:
    """The coefficients of a model's compressed layers; dense gradients have none."""
    found = (layer._parameters["coef"] for layer in compressed_layers(model).values())
    return [coef for coef in found if coef is not None]


def compress(model: ModelT, config: VeloraConfig | None = None) -> ModelT:
    """Compress layers of a model in place: do this before building the optimizer.

    Forward outputs, input gradients, module names, hooks and ``state_dict`` keys stay what they
    were. Each compressed layer gets a trainable ``coef`` (O x G) and its weight is frozen; after
    every step of a torch optimizer the coefficients are folded into the weight.

    Args:
        model: any module.
        config: what to compress and how; defaults to ``VeloraConfig()``, and to
            ``VeloraConfig.recommended("lora")`` for a model with adapters of PEFT.

    Returns:
        The same model.

    Warns:
        UserWarning: compressing a layer that ``targets`` name frees no activations, since something
            else keeps the same input. Known at once or after the model's first training forward.

    Raises:
        ValueError: the model is compressed already, a target matches nothing, or nothing can be
            compressed. The model is then unchanged, as it is after any other error.
    """
    if config is None:
        config = VeloraConfig.recommended("lora") if has_adapters(model) else VeloraConfig()
    if not isinstance(config, VeloraConfig):
        raise TypeError(f"config must be a VeloraConfig, got {type(config).__name__}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "compress makes parameters, and those made in inference mode cannot be trained: call "
            "it outside of torch.inference_mode()"
        )
    already = {**compressed_layers(model), **compressed_adapters(model)}
    if already:
        raise ValueError(
            f"this model is compressed already ({len(already)} layers, the first is "
            f"{next(iter(already))!r}); call velora_torch.restore(model) first"
        )
    selection = select(model, config)
    chosen = selection.chosen
    for layer in chosen:
        _check_free(layer)
    # Who asks for everything asks for the small gradients of layers that free nothing too.
    # What was frozen kept no input that could be freed.
    keepers = [layer.name for layer in chosen if layer.module._parameters["weight"].requires_grad]  # type: ignore[union-attr]
    known = config.targets == "all-linear" or not keepers or foresee(model, keepers)
    watch()
    plain = [_Plain(layer.module) for layer in chosen]
    try:
        for layer in chosen:
            module = layer.module
            module.__class__ = compressed_class(type(module), layer_kind(module))
            assert isinstance(module, CompressedLayer)
            _start(module, layer, config)
        for adapter in selection.adapters:
            _start_adapter(adapter, config)
    except BaseException:  # out of memory, or interrupted
        for started in compressed_adapters(model).values():
            started.stop()
        for former in plain:
            former.bring_back()
        raise
    keep_differentiable(model)
    make_lean(model)
    watch_adapters(model, config)
    if not known:
        arm(model)
    choose_before_forwards(model)
    return model


def fold(model: ModelT) -> ModelT:
    """Merge pending coefficients into the weights; does nothing where none are pending.

    Raises:
        ValueError: coefficients are pending on a quantised weight, into which nothing can be
            folded. Nothing has been changed then.
    """
    layers = compressed_layers(model).values()
    for layer in layers:
        layer.collect()
        if layer.velora.pending and isinstance(layer, CompressedQuantized):
            raise ValueError(layer.why_not_folded())
    for layer in layers:
        layer.fold_all()
    return model


def restore(model: ModelT, drop_pending: bool = False) -> ModelT:
    """Make every layer plain again, with all updates in its weight.

    Nothing of velora is left in the model. Weights train again, so build a new optimizer; those
    that were frozen before (``train_frozen``) stay frozen.

    Args:
        model: a compressed model, or a plain one.
        drop_pending: throw away coefficients that are pending on quantised weights.

    Raises:
        ValueError: such coefficients are pending, and ``drop_pending`` is false. Nothing has been
            changed then.
    """
    if drop_pending:
        for layer in compressed_layers(model).values():
            if isinstance(layer, CompressedQuantized):
                layer._drop_pending()
    unwatch_adapters(disarm(forget(fold(model))))
    for adapter in compressed_adapters(model).values():
        adapter.stop()
    for layer in compressed_layers(model).values():
        coef = layer._parameters["coef"]
        plain = layer.plain_class
        layer.stop()
        layer.__class__ = plain  # type: ignore[assignment]
        if coef is not None:
            retire(coef)
    return undo_recompute(model)


def _start(module: CompressedLayer, layer: Chosen, config: VeloraConfig) -> None:
    """Start a layer whose class has been changed; one of a dormant adapter stays untrained."""
    weight = module.raw_weight
    if layer.dormant:
        weight.requires_grad_(True)
    module.start(layer.name, layer.groups, layer.size, config)
    if layer.dormant:
        coef = module._parameters["coef"]
        (weight if coef is None else coef).requires_grad_(False)


def _start_adapter(adapter: ChosenAdapter, config: VeloraConfig) -> None:
    unit, module = adapter.unit, adapter.unit.module
    module.__class__ = compressed_adapter_class(type(module))
    assert isinstance(module, CompressedAdapter)
    attributes = tuple(dict.fromkeys(unit.inside(part) for part in adapter.parts))
    products = tuple((p.kind, p.features, p.attributes) for p in unit.products)
    module.start(AdapterState(unit.name, config, attributes, tuple(adapter.widths), products))


class _Plain:
    """A plain layer as it is before it is compressed."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.attributes = dict(module.__dict__)
        self.registries = {key: copy.copy(module.__dict__[key]) for key in REGISTRIES}
        weight = module._parameters["weight"]
        assert weight is not None
        self.grad, self.trained = weight.grad, weight.requires_grad

    def bring_back(self) -> None:
        """Undo a compression that has not trained anything yet, finished or not."""
        self.module.__class__ = self.kind
        self.module.__dict__ = self.attributes
        for key, content in self.registries.items():
            registry = self.attributes[key]
            registry.clear()
            registry.update(content)
        weight = self.module._parameters["weight"]
        assert weight is not None
        weight.requires_grad_(self.trained).grad = self.grad
        LIVE.discard(self.module)  # type: ignore[arg-type]


def _check_free(layer: Chosen) -> None:
    """Refuse a layer that is split already, or uses one of our names for something of its own."""
    if is_sharded(layer.module._parameters["weight"]):
        raise ValueError(
            f"the weight of layer {layer.name!r} is a DTensor: the model has been sharded already, "
            f"and coefficients would not be. Call velora_torch.compress before fully_shard or "
            f"parallelize_module"
        )
    for name in ("coef", "velora", *(f"velora_{tensor}" for tensor in TENSORS)):
        if hasattr(layer.module, name):
            raise ValueError(
                f"layer {layer.name!r} has an attribute {name!r} of its own, a name that a "
                f"compressed layer needs; rename it, or leave the layer out of targets"
            )
