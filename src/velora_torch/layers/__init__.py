"""One file per kind of layer that can be compressed."""

from __future__ import annotations

from torch import nn

from velora_torch.layers.base import CompressedLayer
from velora_torch.layers.conv1d import CompressedConv1D, is_conv1d
from velora_torch.layers.linear import CompressedLinear, is_linear
from velora_torch.swap import Swapped, plain_class

_CLASSES: dict[type[nn.Module], type[CompressedLayer]] = {}

__all__ = ["CompressedLayer", "compressed_class", "linear_shape", "uncompressible"]


def uncompressible(module: nn.Module) -> str | None:
    """Why a module that holds a weight cannot be compressed; ``None`` if its kind can be."""
    kind = plain_class(module)
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"{kind.__name__} is not a linear layer"
    if isinstance(module, Swapped):
        return f"{module.kind}: to compress it too, do so before recompute"
    if not (is_linear(module) or is_conv1d(module)):
        return f"{kind.__name__} brings a forward of its own"
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    if "weight" not in module._parameters or module._parameters["weight"] is None:
        return "its weight is computed by a parametrization"
    if module._parameters["weight"].dim() != 2:
        return "its weight is not a matrix"
    if not module._parameters["weight"].is_floating_point():
        return "its weight is not floating point"
    return None


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(O, D) of a module that can be compressed."""
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def compressed_class(original: type[nn.Module]) -> type[CompressedLayer]:
    """The compressed subclass of a plain layer class: one for each, made when first needed."""
    if original not in _CLASSES:
        _CLASSES[original] = _make_class(original)
    return _CLASSES[original]


def _make_class(original: type[nn.Module]) -> type[CompressedLayer]:
    base = CompressedLinear if issubclass(original, nn.Linear) else CompressedConv1D
    body = {"__module__": __name__, "plain_class": original}
    return type(f"Compressed{original.__name__}", (base, original), body)
