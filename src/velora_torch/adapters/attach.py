"""An adapter is a child of the module it adapts, whose class is changed in place to call it.

So the module's name, hooks, parameters and ``state_dict`` keys stay what they were, and code that
asks ``isinstance(module, nn.Linear)`` gets the same answer. :mod:`velora_torch.swap` does the same
for modules that gain no child and that ``restore`` makes plain again; adapters outlive that.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from velora_torch.layers import CompressedLayer
from velora_torch.swap import Mixed, mixed_class


class Adapted(Mixed):
    """Mixed in before the class of the adapted module; its forward calls the adapter."""

    child: str
    """Name of the adapter among the module's children, in ``state_dict`` keys too."""
    method: str
    """What the adapter is called in messages."""


def attach(module: nn.Module, mixin: type[Adapted], adapter: nn.Module) -> None:
    """Give a module an adapter."""
    module.add_module(mixin.child, adapter)
    module.__class__ = mixed_class(mixin, type(module))


def detach(module: Adapted) -> None:
    """Make a module plain again, without its adapter."""
    del module._modules[module.child]
    module.__class__ = module.plain_class  # type: ignore[assignment]


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """The modules that have an adapter, by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def check_bare(model: nn.Module) -> None:
    """Refuse a model that adapters cannot be added to.

    Raises:
        ValueError: it is compressed, or has adapters of ours or of PEFT.
    """
    adapted = adapted_modules(model)
    if adapted:
        name, module = next(iter(adapted.items()))
        raise ValueError(
            f"this model has {module.method} adapters already ({len(adapted)} of them, the first "
            f"on {name!r}); call velora_torch.adapters.merge_adapters(model) first, or load the "
            f"model again"
        )
    loaded = sys.modules.get("peft.tuners.tuners_utils")
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            raise ValueError(
                f"this model is compressed already (the first layer is {name!r}): add adapters "
                f"before velora_torch.compress(model), or call velora_torch.restore(model) first"
            )
        if loaded is not None and isinstance(module, loaded.BaseTunerLayer):
            raise ValueError(
                f"this model has PEFT adapters already (the first on {name!r}); merge them "
                f"(model.merge_and_unload()), or load the model again"
            )


def freeze(model: nn.Module, head: list[str]) -> None:
    """Freeze all of a model but the modules named in ``head``."""
    model.requires_grad_(False)
    for name in head:
        model.get_submodule(name).requires_grad_(True)


def adapter_dtype(weight: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type of an adapter's parameters: as asked, or float32 and wider.

    16-bit numbers near one are 0.008 apart, which swallows the updates of a scale.
    """
    if dtype is not None:
        return dtype
    if weight.is_floating_point() and weight.dtype.itemsize >= 2:
        return torch.promote_types(weight.dtype, torch.float32)
    return torch.float32  # quantised
