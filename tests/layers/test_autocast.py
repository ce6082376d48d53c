"""Mixed precision: the plain layer's output, and gradients as good as its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import velora_torch
from velora_torch import VeloraConfig

from ..closeness import TOLERANCE, assert_bitwise, assert_close
from .cases import GRADIENTS, KINDS, Make, compress, expected_gradients, weight_gradient, weight_OD

HALVES = [
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]


@pytest.mark.parametrize("groups", [4, 5], ids=["divisible", "cut"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
def test_under_autocast(
    make: Make, gradient: str, half: torch.dtype, weights: torch.dtype, groups: int
):
    plain = make(12, 6).to(weights)
    layer = compress(plain, groups, gradient=gradient)
    x = torch.randn(2, 5, 12).requires_grad_()
    with torch.autocast("cpu", half):
        y, y_plain = layer(x), plain(x)
    assert y.dtype == half
    assert_bitwise(y, y_plain)
    dY = torch.randn(y.shape).to(half)
    y.backward(dY)
    dX, dW, db = expected_gradients(layer, x, weight_OD(plain), dY)
    assert x.grad is not None
    assert (x.grad.dtype, layer.bias.grad.dtype) == (torch.float32, weights)
    assert_close(x.grad, dX, TOLERANCE[half])
    assert_close(weight_gradient(layer), dW, TOLERANCE[half])
    assert_close(layer.bias.grad, db, TOLERANCE[half])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_backward_inside_autocast(gradient: str):
    plain = nn.Linear(12, 6)
    layer = compress(plain, gradient=gradient)
    x = torch.randn(5, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        dY = torch.randn(y.shape).bfloat16()
        y.backward(dY)
    dX, dW, _ = expected_gradients(layer, x, weight_OD(plain), dY)
    assert_close(x.grad, dX, TOLERANCE[torch.bfloat16])
    assert_close(weight_gradient(layer), dW, TOLERANCE[torch.bfloat16])


def test_autocast_leaves_float64_alone():
    plain = nn.Linear(12, 6).double()
    layer = compress(plain)
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y, y_plain = layer(x), plain(x)
    assert_bitwise(y, y_plain)
    dY = torch.randn_like(y)
    y.backward(dY)
    _, dW, _ = expected_gradients(layer, x, weight_OD(plain), dY)
    assert_close(weight_gradient(layer), dW, 1e-10)


@pytest.mark.parametrize("direction", ["v", "sign"])
def test_pending_coefficients_under_autocast(direction: str):
    layer = compress(nn.Linear(12, 6), fold_every=None)
    x = torch.randn(5, 12)
    layer(x)
    layer.velora.direction = direction
    with torch.no_grad():
        layer.coef.normal_()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, exact, TOLERANCE[torch.bfloat16])


def test_training_under_autocast_is_near_training_without():
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 6))
    velora_torch.compress(model, VeloraConfig(num_groups=4, init="random"))
    exact = copy.deepcopy(model)
    before = model[0].weight.detach().clone()
    data = [torch.randn(20, 12) for _ in range(10)]
    for current, enabled in ((model, True), (exact, False)):
        optimizer = torch.optim.SGD(current.parameters(), 0.1)
        for x in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = (current(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
    moved = exact[0].weight.detach() - before
    assert_close(model[0].weight.detach() - before, moved, 0.05)
