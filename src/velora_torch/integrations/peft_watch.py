"""Warns when adapters come into use that were not there when their PEFT model was compressed."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from velora_torch.config import VeloraConfig
from velora_torch.integrations.peft import tuner_layers
from velora_torch.layers import CompressedLayer

ModelT = TypeVar("ModelT", bound=nn.Module)
State = tuple[tuple[str, ...], tuple[str, ...]]
"""Active adapters, and all of them."""


class LateAdapterWarning(UserWarning):
    """An adapter is trained that was added after the model was compressed."""


def watch_adapters(model: nn.Module, config: VeloraConfig) -> None:
    """Look at a PEFT model's adapters before its training forwards, and warn of new ones."""
    if tuner_layers(model) and not isinstance(model, CompressedLayer):
        model.register_forward_pre_hook(_Watch(config, _state(model)))


def unwatch_adapters(model: ModelT) -> ModelT:
    """Remove what :func:`watch_adapters` has left on a model or parts of it."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Watch)]:
            del hooks[key]
    return model


class _Watch:
    """The hook on a model. Holds names only, so that a copy of the model can have a copy of it."""

    def __init__(self, config: VeloraConfig, state: State) -> None:
        self._config, self._state = config, state

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        state = _state(model)
        if state != self._state:
            self._state = state
            _warn(_exact_by_mistake(model, self._config))


def _state(model: nn.Module) -> State:
    """Which adapters are active, and which there are, from the first adapted layer."""
    kind = next(iter(tuner_layers(model).values()), None)
    if kind is None:
        return (), ()
    return tuple(kind.active_adapters), tuple(kind._all_available_adapter_names())


def _exact_by_mistake(model: nn.Module, config: VeloraConfig) -> list[str]:
    from velora_torch.selection import Selector  # which needs this package's other half

    selector = Selector(model, config)
    return [
        name
        for name, module in selector.holders.items()
        if not isinstance(module, CompressedLayer)
        and not selector.is_compressed_adapter(name)
        and selector.why_exact(name, module) is None
        and any(p.requires_grad for p in module.parameters(recurse=False))
    ]


def _warn(names: list[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    warnings.warn(
        f"VeLoRA: adapter layer {names[0]!r}{more} came into the model after it was compressed, so "
        f"it is trained exactly and keeps its input. To compress it too, call "
        f"velora_torch.restore(model), then velora_torch.compress(model, config), and build the "
        f"optimizer after that.",
        LateAdapterWarning,
        stacklevel=2,
    )
