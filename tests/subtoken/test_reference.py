"""The reference against loops over single numbers, written from the paper's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from velora_torch.subtoken import reference

from ..closeness import assert_close

SIZES = [
    pytest.param(12, 4, 3, id="divisible"),
    pytest.param(10, 4, 3, id="last-group-cut"),
    pytest.param(10, 6, 2, id="last-group-all-padding"),
    pytest.param(5, 5, 1, id="G-is-D"),
    pytest.param(5, 1, 5, id="one-group"),
]


def unit_vectors(groups: int, size: int) -> Tensor:
    v_GM = torch.randn(groups, size, dtype=torch.float64)
    return v_GM / v_GM.norm(dim=1, keepdim=True)


def feature(x: Tensor, t: int, g: int, m: int, size: int) -> float:
    d = g * size + m
    return x[t, d].item() if d < x.shape[1] else 0.0


@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_compress_is_equation_1(features: int, groups: int, size: int):
    x_TD, v_GM = torch.randn(3, features, dtype=torch.float64), unit_vectors(groups, size)
    z_TG = reference.compress(x_TD, v_GM)
    assert z_TG.shape == (3, groups)
    for t in range(3):
        for g in range(groups):
            z = sum(feature(x_TD, t, g, m, size) * v_GM[g, m].item() for m in range(size))
            assert z_TG[t, g].item() == pytest.approx(z, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_reconstruct_is_equation_2(features: int, groups: int, size: int):
    z_TG, v_GM = torch.randn(3, groups, dtype=torch.float64), unit_vectors(groups, size)
    x_hat_TD = reference.reconstruct(z_TG, v_GM, features)
    assert x_hat_TD.shape == (3, features)
    for t in range(3):
        for d in range(features):
            g, m = divmod(d, size)
            assert x_hat_TD[t, d].item() == z_TG[t, g].item() * v_GM[g, m].item()


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_gradients_are_algorithm_1(features: int, groups: int, size: int, scale: float):
    tokens, outputs = 6, 4
    x = torch.randn(2, 3, features, dtype=torch.float64)
    weight = torch.randn(outputs, features, dtype=torch.float64)
    dY = torch.randn(2, 3, outputs, dtype=torch.float64)
    v_GM = unit_vectors(groups, size)

    flat_x, flat_dY = x.reshape(tokens, features), dY.reshape(tokens, outputs)
    dX = torch.zeros(tokens, features, dtype=torch.float64)
    dW = torch.zeros(outputs, features, dtype=torch.float64)
    db = torch.zeros(outputs, dtype=torch.float64)
    for t in range(tokens):
        for o in range(outputs):
            db[o] += flat_dY[t, o]
            for d in range(features):
                g, m = divmod(d, size)
                z = sum(feature(flat_x, t, g, k, size) * v_GM[g, k].item() for k in range(size))
                dX[t, d] += flat_dY[t, o] * weight[o, d]
                dW[o, d] += scale * flat_dY[t, o] * z * v_GM[g, m]

    got_dX, got_dW, got_db = reference.linear_gradients(x, weight, dY, v_GM, scale)
    assert_close(got_dX, dX.reshape(x.shape), 1e-12)
    assert_close(got_dW, dW, 1e-12)
    assert_close(got_db, db, 1e-12)


def test_gradient_is_exact_where_a_vector_loses_nothing():
    """G = D keeps every feature, so the coarse gradient is the true one."""
    x = torch.randn(5, 7, dtype=torch.float64)
    weight = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    dY = torch.randn(5, 3, dtype=torch.float64)
    (x @ weight.T).backward(dY)
    _, dW, _ = reference.linear_gradients(x, weight.detach(), dY, torch.ones(7, 1).double())
    assert_close(dW, weight.grad, 1e-12)


def test_norm_of_the_factor_is_the_norm_of_the_gradient():
    x, dY = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    v_GM = unit_vectors(4, 3)
    _, dW, _ = reference.linear_gradients(x, torch.zeros(3, 12).double(), dY, v_GM)
    factor_OG = dY.T @ reference.compress(x, v_GM)
    assert math.isclose(factor_OG.norm().item(), dW.norm().item(), rel_tol=1e-12)
    assert_close(reference.expand(factor_OG, v_GM, 12), dW, 1e-12)
