"""Plain layers to compress, and what the reference says about them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.subtoken import reference

Make = Callable[..., nn.Module]


class Renamed(nn.Linear):
    """A subclass that keeps its parent's forward."""

    note = "mine"


def linear(features: int, outputs: int, bias: bool = True) -> nn.Module:
    return nn.Linear(features, outputs, bias=bias)


def subclass(features: int, outputs: int, bias: bool = True) -> nn.Module:
    return Renamed(features, outputs, bias=bias)


def conv1d(features: int, outputs: int, bias: bool = True) -> nn.Module:
    """GPT-2's layer: its weight is (D, O), and it always has a bias."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(outputs, features)
    nn.init.normal_(layer.bias)
    return layer


KINDS = [
    pytest.param(linear, id="Linear"),
    pytest.param(subclass, id="subclass"),
    pytest.param(conv1d, id="Conv1D"),
]
GRADIENTS = ["factored", "dense"]


def compress(layer: nn.Module, num_groups: int = 4, **settings: Any) -> CompressedLayer:
    """A compressed copy of a layer, named "0" in a model of its own."""
    model = nn.Sequential(copy.deepcopy(layer)).train()
    velora_torch.compress(model, VeloraConfig(num_groups=num_groups, **settings))
    (compressed,) = model
    assert isinstance(compressed, CompressedLayer)
    return compressed


def weight_OD(layer: nn.Module) -> Tensor:
    """A copy of the weight of a plain or compressed layer, as (O, D), in float64."""
    weight = layer._parameters["weight"]
    assert weight is not None
    transposed = type(layer).__name__ in ("Conv1D", "CompressedConv1D")
    return (weight.t() if transposed else weight).detach().double().clone()


def expected_gradients(
    layer: CompressedLayer, x: Tensor, weight: Tensor, dY: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's dX, dW and db in float64, with the layer's vectors and scale."""
    return reference.linear_gradients(
        x.detach().double(),
        weight,
        dY.double(),
        layer.velora_vectors.double(),
        layer.velora.config.scale,
    )


def weight_gradient(layer: CompressedLayer) -> Tensor:
    """The gradient that the layer has got, as dW (O, D) in float64."""
    if layer.velora.config.gradient == "dense":
        gradient = layer.raw_weight.grad
        assert gradient is not None
        return (gradient.t() if layer.transposed else gradient).double()
    assert layer.coef.grad is not None
    return reference.expand(layer.coef.grad.double(), layer.velora_vectors.double(), layer.features)
