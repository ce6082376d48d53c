"""The compressed scale and shift against its reference: output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from velora_torch.subtoken import reference
from velora_torch.subtoken.factored import project
from velora_torch.subtoken.scale_shift import CompressedScaleShift, apply_scale_shift

from ..closeness import TOLERANCE, assert_bitwise, assert_close

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
SIZES = [
    pytest.param(12, 4, 3, id="divisible"),
    pytest.param(11, 4, 3, id="last-group-cut"),
    pytest.param(10, 6, 2, id="group-all-padding"),
    pytest.param(7, 1, 7, id="one-group"),
    pytest.param(7, 7, 1, id="G-is-D"),
    pytest.param(1, 1, 1, id="one-feature"),
]


def vectors(groups: int, size: int) -> Tensor:
    v = torch.randn(groups, size, dtype=torch.float64)
    return v / v.norm(dim=1, keepdim=True)


def check(
    x: Tensor,
    v: Tensor,
    dim: int = -1,
    shift: bool = True,
    scale: float = 1.0,
    parameter_dtype: torch.dtype | None = None,
) -> None:
    dtype = x.dtype
    features = x.shape[dim]
    kind = parameter_dtype or dtype
    gamma = (1 + 0.3 * torch.randn(features)).to(kind).requires_grad_()
    beta = torch.randn(features).to(kind).requires_grad_() if shift else None
    x = x.detach().requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    z = project(x.detach().movedim(dim, -1), v.to(wide))
    y = CompressedScaleShift.apply(x, gamma, beta, z, v.to(wide), scale, dim, "layer")
    plain = apply_scale_shift(x.detach(), gamma.detach(), beta, dim)
    assert_bitwise(y.detach(), plain.detach())
    assert y.dtype == dtype

    dY = torch.randn(y.shape).to(dtype)
    y.backward(dY)
    dX, dgamma, dbeta = reference.scale_shift_gradients(
        x.detach().movedim(dim, -1).double(),
        gamma.detach().to(dtype).double(),
        dY.movedim(dim, -1).double(),
        v.double(),
        scale,
    )
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert gamma.grad is not None
    assert gamma.grad.dtype == kind
    tolerance = TOLERANCE[dtype]
    assert_close(x.grad.movedim(dim, -1), dX, tolerance)
    assert_close(gamma.grad, dgamma, tolerance)
    if beta is not None:
        assert_close(beta.grad, dbeta, tolerance)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "scale-alone"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_sizes_and_types(
    features: int, groups: int, size: int, dtype: torch.dtype, shift: bool, scale: float
):
    x = torch.randn(2, 5, features).to(dtype)
    check(x, vectors(groups, size), shift=shift, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_wide_parameters_beside_16_bit_inputs(dtype: torch.dtype):
    check(torch.randn(2, 5, 12).to(dtype), vectors(4, 3), parameter_dtype=torch.float32)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


INPUTS = [
    pytest.param(lambda: numbers(12), -1, id="1-D"),
    pytest.param(lambda: numbers(5, 12), -1, id="2-D"),
    pytest.param(lambda: numbers(2, 3, 4, 12), -1, id="4-D"),
    pytest.param(lambda: numbers(2, 12, 3, 4), 1, id="channels-second"),
    pytest.param(lambda: numbers(2, 12, 3, 4), -3, id="channels-first-image"),
    pytest.param(lambda: numbers(12, 3, 4), -3, id="one-image"),
    pytest.param(lambda: numbers(2, 3, 4, 12).movedim(-1, 1), 1, id="channels-last-memory"),
    pytest.param(lambda: numbers(12, 5).t(), -1, id="transposed"),
    pytest.param(lambda: numbers(2, 5, 24)[..., ::2], -1, id="sliced-features"),
    pytest.param(lambda: numbers(9, 4, 12)[::2, 1:], -1, id="sliced-tokens"),
    pytest.param(lambda: numbers(1, 4, 12).expand(3, 4, 12), -1, id="expanded"),
]


@pytest.mark.parametrize(("groups", "size"), [(4, 3), (5, 3)])
@pytest.mark.parametrize(("make", "dim"), INPUTS)
def test_inputs(make: Callable[[], Tensor], dim: int, groups: int, size: int):
    check(make(), vectors(groups, size), dim)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)], ids=["2-D", "3-D"])
def test_no_tokens(shape: tuple[int, ...]):
    """Zero gradients, not missing ones."""
    check(numbers(*shape), vectors(4, 3))


def test_the_gradient_is_exact_for_inputs_that_the_vectors_span():
    """x = z v loses nothing, so autograd's own gradient is the expected one."""
    v = vectors(4, 3)
    x = (numbers(6, 4, 1) * v).flatten(1)
    gamma = numbers(12).requires_grad_()
    dY = numbers(6, 12)
    (expected,) = torch.autograd.grad((gamma * x), gamma, dY)
    y = CompressedScaleShift.apply(x, gamma, None, project(x, v), v, 1.0, -1, "layer")
    (actual,) = torch.autograd.grad(y, gamma, dY)
    assert_close(actual, expected, 1e-12)


def saved_by(y: Tensor) -> list[tuple[int, ...]]:
    return sorted(tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None)  # type: ignore[union-attr]


def test_it_saves_z_and_what_has_the_size_of_one_token():
    x, v = torch.randn(40, 12, requires_grad=True), vectors(4, 3).float()
    gamma, beta = torch.ones(12, requires_grad=True), torch.zeros(12, requires_grad=True)
    y = CompressedScaleShift.apply(x, gamma, beta, project(x.detach(), v), v, 1.0, -1, "layer")
    assert saved_by(y) == [(4, 3), (12,), (40, 4)]


def test_in_place_operator_afterwards():
    x, v = numbers(5, 12).requires_grad_(), vectors(4, 3)
    gamma = numbers(12).requires_grad_()
    y = CompressedScaleShift.apply(x, gamma, None, project(x.detach(), v), v, 1.0, -1, "layer")
    positive = (x * gamma > 0).detach()
    torch.relu_(y).sum().backward()
    assert_close(x.grad, positive * gamma, 1e-12)


@pytest.mark.parametrize("wrt", ["x", "gamma"])
def test_double_backward_is_refused(wrt: str):
    v = vectors(4, 3)
    given: dict[str, Any] = {"x": numbers(5, 12).requires_grad_()}
    given["gamma"] = numbers(12).requires_grad_()
    x, gamma = given["x"], given["gamma"]
    y = CompressedScaleShift.apply(x, gamma, None, project(x.detach(), v), v, 1.0, -1, "layer")
    (first,) = torch.autograd.grad(y.square().sum(), given[wrt], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()
