"""``layer.weight`` for code that uses it without calling the layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.subtoken import reference

from ..closeness import assert_bitwise, assert_close
from .cases import GRADIENTS, KINDS, Make, compress, weight_OD


def factor(dW_OD: Tensor, layer: CompressedLayer) -> Tensor:
    """What an exact gradient is on the coefficients."""
    return layer.velora.config.scale * reference.compress(dW_OD, layer.velora_vectors)


def drawn(make: Make, **settings: Any) -> CompressedLayer:
    layer = compress(make(10, 6).double(), **settings)
    layer(torch.randn(7, 10, dtype=torch.float64) + 0.4)
    return layer


def as_OD(layer: CompressedLayer, weight: Tensor) -> Tensor:
    return weight.t() if layer.transposed else weight


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("vectors", ["shared", "per_group"])
@pytest.mark.parametrize("make", KINDS)
def test_functional_use_trains_by_the_exact_factor(make: Make, vectors: str, scale: float):
    layer = drawn(make, vectors=vectors, scale=scale)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    weight = weight_OD(layer)
    y = F.linear(x, as_OD(layer, layer.weight))
    assert_close(y, x @ weight.T, 1e-14)
    dY = torch.randn_like(y)
    y.backward(dY)
    assert_close(layer.coef.grad, factor(dY.T @ x.detach(), layer), 1e-12)
    assert_close(x.grad, dY @ weight, 1e-12)


@pytest.mark.parametrize("make", KINDS)
def test_penalty_on_the_weight(make: Make):
    layer = drawn(make)
    layer.weight.square().sum().backward()
    assert_close(layer.coef.grad, factor(2 * weight_OD(layer), layer), 1e-12)


def test_penalty_and_forward_add_up():
    layer = drawn(KINDS[0].values[0])
    x = torch.randn(5, 10, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert layer.coef.grad is not None
    alone = layer.coef.grad.clone()
    layer.coef.grad = None
    (layer(x).square().sum() + layer.weight.square().sum()).backward()
    assert_close(layer.coef.grad, alone + factor(2 * weight_OD(layer), layer), 1e-12)


@pytest.mark.parametrize("init", ["average", "batch_average"])
def test_weight_read_before_vectors_are_drawn(init: str):
    """The factor is that of the vectors which the step's fold will use."""
    layer = compress(nn.Linear(10, 6).double(), init=init)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        penalty = layer.weight.square().sum()
        layer(torch.randn(7, 10, dtype=torch.float64) + 0.4)  # draws
        penalty.backward()
        assert_close(layer.coef.grad, factor(2 * weight_OD(layer), layer), 1e-12)
        optimizer.step()


def test_functional_use_alone_trains():
    """A layer that is never called has no batch to choose v from; it still learns."""
    layer = compress(nn.Linear(10, 6))
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    x, target = torch.randn(50, 10), torch.randn(50, 6)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (F.linear(x, layer.weight, layer.bias) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_the_weight_is_a_parameter_in_the_same_memory(mode: Any):
    layer = drawn(KINDS[0].values[0])
    with mode():
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        assert weight.data_ptr() == layer.raw_weight.data_ptr()
        weight.fill_(0.5)
        assert (layer.raw_weight == 0.5).all()
    layer.coef.requires_grad_(False)
    assert layer.weight is layer.raw_weight


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_products_with_the_weight_have_the_bits_of_the_plain_layer(mode: Any):
    """With a frozen matrix torch multiplies a batch matrix by matrix, in another order."""
    plain = nn.Linear(64, 48)
    layer = compress(copy.deepcopy(plain))
    for seed in range(20):
        x = torch.randn(2, 64, 9, generator=torch.Generator().manual_seed(seed))
        with mode():
            assert_bitwise(layer.weight @ x, plain.weight @ x)
            assert_bitwise(x.mT @ layer.weight.T, x.mT @ plain.weight.T)


def test_dense_weight_is_the_parameter():
    layer = drawn(KINDS[0].values[0], gradient="dense")
    assert layer.weight is layer.raw_weight
    layer.weight.square().sum().backward()
    assert_close(layer.raw_weight.grad, 2 * weight_OD(layer), 1e-14)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
def test_edits_of_data_reach_the_layer(make: Make, gradient: str):
    layer = drawn(make, gradient=gradient)
    layer.weight.data.fill_(0.5)
    assert (layer.raw_weight == 0.5).all()
    x = torch.randn(3, 10, dtype=torch.float64)
    assert_close(layer(x), x.sum(1, keepdim=True) * 0.5 + layer.bias, 1e-12)


def test_initialisers_reach_the_layer():
    layer = drawn(KINDS[0].values[0])
    nn.init.zeros_(layer.weight)
    assert not layer.raw_weight.any()
    layer.reset_parameters()
    assert layer.raw_weight.any()


def test_multihead_attention_stays_exact():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
            self.out = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    model = Attends()
    before = {name: type(module) for name, module in model.attention.named_modules()}
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    assert {name: type(module) for name, module in model.attention.named_modules()} == before
    assert isinstance(model.out, CompressedLayer)
    model(torch.randn(2, 5, 12)).sum().backward()
    assert model.attention.out_proj.weight.grad is not None
    reason = velora_torch.summary(model).exact["attention.out_proj"]
    assert "MultiheadAttention" in reason


# ------------------------------------------------------------------ requires_grad


@pytest.mark.parametrize("make", KINDS)
def test_frozen_coefficients_make_a_plain_layer(make: Make):
    plain = make(10, 6).double()
    layer = compress(plain)
    layer.coef.requires_grad_(False)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert_bitwise(y, plain(x))
    assert type(y.grad_fn).__name__ != "FactoredLinearBackward"
    y.sum().backward()
    assert layer.coef.grad is None
    assert layer.raw_weight.grad is None
    assert_close(x.grad, torch.ones(5, 6, dtype=torch.float64) @ weight_OD(plain), 1e-12)
    assert not layer.velora.drawn


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_freeze_and_thaw_the_whole_model(gradient: str):
    layer = compress(nn.Linear(10, 6), gradient=gradient)
    x = torch.randn(5, 10)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    layer.requires_grad_(True)
    layer(x).sum().backward()
    if gradient == "factored":
        assert layer.coef.grad is not None
        assert layer.raw_weight.grad is None, "the coefficients train the weight"
    else:
        assert layer.raw_weight.grad is not None


@pytest.mark.parametrize("frozen", ["bias", "coef"])
def test_only_what_is_asked_for_gets_a_gradient(frozen: str):
    layer = compress(nn.Linear(10, 6))
    getattr(layer, frozen).requires_grad_(False)
    layer(torch.randn(5, 10)).sum().backward()
    assert (layer.bias.grad is None) == (frozen == "bias")
    assert (layer.coef.grad is None) == (frozen == "coef")
