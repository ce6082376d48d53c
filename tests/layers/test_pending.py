"""Coefficients that are not in the weight yet reach the output, dX and their own gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velora_torch.config import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.subtoken import reference

from ..closeness import TOLERANCE, assert_bitwise, assert_close
from .cases import KINDS, Make, compress, weight_OD

CONFIG = VeloraConfig(num_groups=4, init="random")
DIRECTIONS = ["v", "sign"]
EVERY = [pytest.param(3, id="fold_every-3"), pytest.param(None, id="never-folded")]


def pending(
    make: Make, direction: str, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[CompressedLayer, Tensor]:
    """A layer with vectors and random pending coefficients, and its merged weight (O, D)."""
    layer = compress(make(10, 6).to(dtype), **{"fold_every": None} | settings)
    layer(torch.randn(8, 10).to(dtype) + 0.5)
    layer.velora.direction = direction
    with torch.no_grad():
        layer.coef.normal_()
    layer.settle()
    assert layer.velora.pending
    v = layer.velora_vectors.double()
    e = v.sign() if direction == "sign" else v
    merged = weight_OD(layer) + reference.expand(layer.coef.detach().double(), e, 10)
    return layer, merged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("groups", [5, 4], ids=["divisible", "cut"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("make", KINDS)
def test_forward_and_backward(
    make: Make,
    every: int | None,
    direction: str,
    groups: int,
    scale: float,
    dtype: torch.dtype,
):
    settings = {"fold_every": every, "num_groups": groups, "scale": scale}
    layer, merged = pending(make, direction, dtype, **settings)
    tolerance = TOLERANCE[dtype]
    x = torch.randn(2, 3, 10).to(dtype).requires_grad_()
    y = layer(x)
    assert layer.velora.pending
    flat = x.detach().double().reshape(-1, 10)
    assert_close(y.reshape(-1, 6), flat @ merged.T + layer.bias.double(), tolerance)
    with torch.no_grad():
        assert_bitwise(layer(x), y.detach())
    dY = torch.randn_like(y)
    y.backward(dY)
    flat_dY = dY.double().reshape(-1, 6)
    z = reference.compress(flat, layer.velora_vectors.double())  # v, whatever e is
    assert_close(x.grad, (flat_dY @ merged).view(x.shape), tolerance)
    assert_close(layer.coef.grad, scale * flat_dY.T @ z, tolerance)
    assert_close(layer.bias.grad, flat_dY.sum(0), tolerance)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("make", KINDS)
def test_fold_merges_all(make: Make, direction: str):
    layer, merged = pending(make, direction)
    x = torch.randn(5, 10, dtype=torch.float64)
    before = layer(x)
    layer.fold()
    assert not layer.velora.pending
    assert not layer.coef.any()
    assert_close(weight_OD(layer), merged, 1e-14)
    assert_close(layer(x), before, 1e-13)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("make", KINDS)
def test_weight_and_state_dict_are_merged(make: Make, direction: str):
    layer, merged = pending(make, direction)
    for weight in (layer.weight, layer.state_dict()["weight"]):
        assert_close(weight.t() if layer.transposed else weight, merged, 1e-14)
    assert layer.velora.pending, "the base weight is left alone"


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("fold_every", [1, 2, 3])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_fold_every_changes_nothing_but_when(make: Make, fold_every: int, kind: Any):
    """The same run, folded each step and rarely."""
    plain = make(10, 6).double()
    batches = [torch.randn(8, 10, dtype=torch.float64) + 0.5 for _ in range(7)]

    def run(every: int) -> tuple[CompressedLayer, int]:
        layer = compress(plain, fold_every=every)
        optimizer = kind(layer.parameters(), lr=0.05, weight_decay=0.1)
        for x in batches:
            optimizer.zero_grad()
            (layer(x) - 1).square().mean().backward()
            optimizer.step()
        folds = layer.velora.folds
        layer.settle()
        if layer.velora.pending:
            layer.fold()
        return layer, folds

    each, _ = run(1)
    rare, folds = run(fold_every)
    assert folds == 7 // fold_every
    assert_close(weight_OD(rare), weight_OD(each), 1e-10)


@pytest.mark.parametrize("make", KINDS)
def test_coefficients_changed_by_hand(make: Make):
    """No optimizer that torch knows of: the next forward notices."""
    layer = compress(make(10, 6).double())
    x = torch.randn(5, 10, dtype=torch.float64)
    y = layer(x)
    weight = weight_OD(layer)
    with torch.no_grad():
        layer.coef.add_(torch.randn(6, 4))
    coef = layer.coef.detach().clone()
    change = reference.expand(coef, layer.velora_vectors, 10)
    assert_close(layer(x), y + x @ change.T, 1e-12)
    layer.fold_all()
    assert_close(weight_OD(layer), weight + change, 1e-14)


@pytest.mark.parametrize("how", ["state_dict", "weight", "deepcopy", "fold_", "float"])
def test_everyone_who_looks_sees_changes_by_hand(how: str):
    import copy

    layer = compress(nn.Linear(10, 6).double())
    layer(torch.randn(5, 10, dtype=torch.float64))
    with torch.no_grad():
        layer.coef.add_(1.0)
    expected = weight_OD(layer) + reference.expand(
        torch.ones(6, 4).double(), layer.velora_vectors, 10
    )
    seen: Tensor
    if how == "state_dict":
        seen = layer.state_dict()["weight"]
    elif how == "weight":
        seen = layer.weight
    elif how == "deepcopy":
        seen = copy.deepcopy(layer).weight
    elif how == "fold_":
        layer.fold_all()
        seen = layer.raw_weight
    else:
        seen = layer.float().weight
    assert_close(seen, expected, 1e-6 if how == "float" else 1e-14)


def test_writing_zeros_is_not_a_step():
    """A broadcast at the start of a distributed run writes what is there already."""
    layer = compress(nn.Linear(10, 6), refresh_every=1)
    with torch.no_grad():
        layer.coef.copy_(torch.zeros(6, 4))
    layer(torch.randn(5, 10))
    assert (layer.velora.steps, layer.velora.folds, layer.velora.lost) == (0, 0, None)


def test_fold_in_inference_mode_leaves_tensors_that_train():
    layer = compress(nn.Linear(10, 6), init="random", refresh_every=1)
    x = torch.randn(5, 10)
    layer(x)
    with torch.no_grad():
        layer.coef.add_(1.0)
    with torch.inference_mode():
        layer(x)
        layer.fold_all()
    assert layer.velora.folds == 1
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).sum().backward()
    optimizer.step()
    assert layer.velora.folds == 2


def test_a_perturbation_for_one_forward_can_be_taken_back():
    """Sharpness-aware minimisation: up, forward and backward, down again, and then the step."""
    layer = compress(nn.Linear(10, 6).double(), init="random")
    x = torch.randn(5, 10, dtype=torch.float64)
    before, y = weight_OD(layer).clone(), layer(x).detach()
    up = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.coef.add_(up)
    change = reference.expand(up, layer.velora_vectors, 10)
    perturbed = layer(x)
    assert_close(perturbed, y + x @ change.T, 1e-12)
    perturbed.sum().backward()
    assert layer.coef.grad is not None
    gradient = layer.coef.grad.clone()
    with torch.no_grad():
        layer.coef.sub_(up)
    assert_close(layer(x), y, 1e-12)
    torch.optim.AdamW(layer.parameters(), 0.1, weight_decay=0.0, eps=1e-30).step()
    step = reference.expand(-0.1 * gradient.sign(), layer.velora_vectors.sign(), 10)
    assert_close(weight_OD(layer), before + step, 1e-12)


@pytest.mark.parametrize("zeroing", ["none", "in_place"])
def test_writes_that_torch_does_not_count_reach_the_output(zeroing: str):
    """A loop of the old school, on ``.data``: the gradient that it used gives it away."""
    layer = compress(nn.Linear(10, 6).double(), init="random")
    x = torch.randn(5, 10, dtype=torch.float64)
    weight = weight_OD(layer).clone()
    total = torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(3):
        (layer(x) - 1).square().mean().backward()
        assert layer.coef.grad is not None
        total -= 0.1 * layer.coef.grad
        layer.coef.data -= 0.1 * layer.coef.grad
        if zeroing == "none":
            layer.coef.grad = None
        else:
            layer.coef.grad.zero_()
    merged = weight + reference.expand(total, layer.velora_vectors, 10)
    assert_close(layer(x), x @ merged.T + layer.bias, 1e-12)
    assert_close(layer.state_dict()["weight"], merged, 1e-12)


@pytest.mark.parametrize("how", ["fold", "restore", "state_dict", "deepcopy"])
def test_writes_that_left_no_trace_are_found_by_who_saves(how: str):
    import copy

    import velora_torch as velora

    model = velora.compress(nn.Sequential(nn.Linear(10, 6).double()), CONFIG)
    layer = model[0]
    coef = torch.randn(6, 4, dtype=torch.float64)
    merged = weight_OD(layer) + reference.expand(coef, layer.velora_vectors, 10)
    layer.coef.data.copy_(coef)
    if how == "fold":
        velora.fold(model)
    elif how == "restore":
        velora.restore(model)
    elif how == "deepcopy":
        model = velora.restore(copy.deepcopy(model))
    assert_close(model.state_dict()["0.weight"], merged, 1e-14)


def test_bf16_weight_with_pending_float32_coefficients():
    """The coefficients keep what the weight could not hold."""
    layer = compress(nn.Linear(10, 6).bfloat16(), fold_every=None)
    layer(torch.randn(5, 10).bfloat16())
    for _ in range(100):
        with torch.no_grad():
            layer.coef.add_(1e-5)
        layer.settle()
    assert layer.coef.dtype == torch.float32
    assert layer.coef.detach().allclose(torch.full((6, 4), 1e-3), rtol=1e-4)
