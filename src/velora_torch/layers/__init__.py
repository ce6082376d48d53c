"""One file per kind of layer that can be compressed."""

from __future__ import annotations

from torch import nn

from velora_torch.layers.base import CompressedLayer
from velora_torch.layers.conv1d import CompressedConv1D, is_conv1d
from velora_torch.layers.linear import CompressedLinear, is_linear
from velora_torch.layers.own_forward import CompressedOwnForward, multiplies_by_weight
from velora_torch.layers.quantized import (
    CompressedQuantized,
    is_quantised,
    looks_quantised,
    unquantisable,
)
from velora_torch.layers.scale_shift import CompressedScaleShift, ScaleShift, is_scale_shift
from velora_torch.swap import Swapped, plain_class

_CLASSES: dict[tuple[type[CompressedLayer], type[nn.Module]], type[CompressedLayer]] = {}

__all__ = ["CompressedLayer", "compressed_class", "layer_kind", "linear_shape", "uncompressible"]


def uncompressible(module: nn.Module) -> str | None:
    """Why a module that holds a weight cannot be compressed; ``None`` if its kind can be."""
    kind = plain_class(module)
    if is_quantised(module) or looks_quantised(module):
        return unquantisable(module)
    if not (isinstance(module, (nn.Linear, ScaleShift)) or is_conv1d(module)):
        return f"{kind.__name__} is not a linear layer"
    if isinstance(module, Swapped):
        return f"{module.kind}: to compress it too, do so before recompute"
    usual = is_linear(module) or is_conv1d(module) or is_scale_shift(module)
    if not usual and not (isinstance(module, nn.Linear) and multiplies_by_weight(module)):
        return f"{kind.__name__} brings a forward of its own"
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    if "weight" not in module._parameters or module._parameters["weight"] is None:
        return "its weight is computed by a parametrization"
    if module._parameters["weight"].dim() != (1 if is_scale_shift(module) else 2):
        return "its weight is not a matrix"
    if not module._parameters["weight"].is_floating_point():
        return "its weight is not floating point"
    return None


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(O, D) of a module that can be compressed."""
    if is_quantised(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    if isinstance(module, ScaleShift):
        return len(module.weight), len(module.weight)
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def layer_kind(module: nn.Module) -> type[CompressedLayer]:
    """What to mix into the class of a module that can be compressed."""
    if is_quantised(module):
        return CompressedQuantized
    if isinstance(module, ScaleShift):
        return CompressedScaleShift
    if not isinstance(module, nn.Linear):
        return CompressedConv1D
    return CompressedLinear if is_linear(module) else CompressedOwnForward


def compressed_class(
    original: type[nn.Module], kind: type[CompressedLayer]
) -> type[CompressedLayer]:
    """The compressed subclass of a plain layer class: one for each, made when first needed."""
    key = (kind, original)
    if key not in _CLASSES:
        body = {"__module__": __name__, "plain_class": original}
        _CLASSES[key] = type(f"Compressed{original.__name__}", (kind, original), body)
    return _CLASSES[key]
