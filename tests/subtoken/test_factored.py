"""The operations on the factor against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from velora_torch.subtoken import factored, reference

from ..closeness import TOLERANCE, assert_bitwise, assert_close

SIZES = [
    pytest.param(12, 4, 3, id="divisible"),
    pytest.param(10, 4, 3, id="last-group-cut"),
    pytest.param(10, 6, 2, id="group-all-padding"),
    pytest.param(3, 2, 4, id="less-than-one-group"),
    pytest.param(5, 5, 1, id="G-is-D"),
    pytest.param(5, 1, 5, id="one-group"),
]
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_project_is_equation_1(features: int, groups: int, size: int, dtype: torch.dtype):
    x = torch.randn(2, 3, features).to(dtype)
    v_GM = torch.randn(groups, size, dtype=torch.float64)
    z_TG = factored.project(x, v_GM)
    assert z_TG.dtype == dtype
    expected = reference.compress(x.reshape(6, -1).double(), v_GM)
    assert_close(z_TG, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_project_on_a_shared_vector(features: int, groups: int, size: int, dtype: torch.dtype):
    x = torch.randn(2, 3, features).to(dtype)
    v_GM = torch.randn(1, size, dtype=torch.float64).repeat(groups, 1)
    v_GM[features // size :] = 0  # the last group has a vector of its own: cut, and a unit vector
    if features % size:
        v_GM[features // size, : features % size] = torch.randn(features % size).double()
    z_TG = factored.project(x, v_GM, shared=True)
    expected = reference.compress(x.reshape(6, -1).double(), v_GM)
    assert_close(z_TG, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 3, 4, 7])
def test_project_in_chunks(tokens: int, monkeypatch):
    monkeypatch.setitem(factored.CHUNK, "cpu", 24)  # two tokens
    x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    v_GM = torch.randn(4, 3, dtype=torch.float64)
    assert_close(factored.project(x, v_GM), reference.compress(x.detach(), v_GM), 1e-12)
    assert torch.autograd.gradcheck(lambda x: factored.project(x, v_GM), (x,))


@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_project_of_no_tokens(features: int, groups: int, size: int):
    assert factored.project(torch.zeros(0, features), torch.ones(groups, size)).shape == (0, groups)
    assert factored.project(torch.zeros(2, 0, features), torch.ones(groups, size)).numel() == 0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x.transpose(0, 1), id="transposed"),
        pytest.param(lambda x: x[::2], id="sliced-tokens"),
        pytest.param(lambda x: x[..., ::2].repeat(1, 1, 2), id="sliced-features"),
        pytest.param(lambda x: x[:1].expand(5, -1, -1), id="expanded"),
    ],
)
def test_project_of_non_contiguous_inputs(change):
    x = change(torch.randn(4, 6, 12, dtype=torch.float64))
    v_GM = torch.randn(4, 3, dtype=torch.float64)
    assert_close(factored.project(x, v_GM), reference.compress(x.reshape(-1, 12), v_GM), 1e-12)


@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_expand_is_the_reference(features: int, groups: int, size: int):
    coef, e = torch.randn(7, groups), torch.randn(groups, size)
    assert_bitwise(factored.expand(coef, e, features), reference.expand(coef, e, features))


def test_contract_is_the_factor_of_an_exact_gradient():
    """d/d coef of a function of W + coef (x) v, by autograd."""
    weight = torch.randn(5, 10, dtype=torch.float64)
    v_GM = torch.randn(4, 3, dtype=torch.float64)
    coef = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    effective = weight + reference.expand(coef, v_GM, 10)
    effective.retain_grad()
    effective.sin().sum().backward()
    assert effective.grad is not None
    assert_close(factored.contract(effective.grad, v_GM), coef.grad, 1e-12)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    y = x @ (weight if transposed else weight.T)
    return y if bias is None else y + bias


@pytest.mark.parametrize("transposed", [False, True], ids=["OD", "DO"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradients_of_the_function(transposed: bool, bias: bool):
    """Without vectors of its own: dX and db are exact, d coef is the factor."""
    shape = (10, 5) if transposed else (5, 10)
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    coef = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    v_GM = torch.randn(4, 3, dtype=torch.float64)
    z = factored.project(x.detach(), v_GM)
    y = factored.FactoredLinear.apply(x, weight, b, coef, z, None, None, 1.0, transposed, "layer")
    dY = torch.randn_like(y)
    y.backward(dY)

    clone = x.detach().clone().requires_grad_()
    clone_b = None if b is None else b.detach().clone().requires_grad_()
    exact(clone, weight, clone_b, transposed).backward(dY)
    assert_close(x.grad, clone.grad, 1e-12)
    if b is not None:
        assert clone_b is not None
        assert_close(b.grad, clone_b.grad, 1e-12)
    assert_close(coef.grad, dY.reshape(-1, 5).T @ z, 1e-12)
    assert weight.grad is None
