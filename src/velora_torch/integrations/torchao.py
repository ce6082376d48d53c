"""torchao: ``nn.Linear`` layers whose weight is a quantised tensor subclass."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_torchao(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a weight of torchao; does not import torchao."""
    loaded = sys.modules.get("torchao.utils")
    if loaded is None or not isinstance(module, nn.Linear):
        return False
    return isinstance(module._parameters.get("weight"), loaded.TorchAOBaseTensor)


def why_not(module: nn.Module) -> str | None:
    """Why such a layer cannot hold coefficients; ``None`` for weight-only quantisation."""
    weight: Any = module._parameters["weight"]
    kind = type(weight).__name__
    if type(weight).dequantize is Tensor.dequantize:
        return f"torchao's {kind} does not say how it is dequantised"
    # Int8Tensor and Float8Tensor name it one way, IntxUnpackedToInt8Tensor the other.
    acts = getattr(weight, "act_quant_kwargs", None), getattr(weight, "activation_quantization", 0)
    if any(acts):
        return f"torchao's {kind} quantises activations too; only weight-only layers are supported"
    return None


def dequantise(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) that the layer computes with, in ``dtype``."""
    weight: Any = module._parameters["weight"]
    values: Tensor = weight.detach().dequantize()
    return values.to(dtype)
