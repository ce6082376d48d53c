"""How far apart two tensors may be."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}
"""Relative error of a sum of products in each type."""


def assert_close(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """``|actual - expected| <= tolerance * |expected|``, in the norm over all entries."""
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.isfinite(actual).all(), "not finite"
    error, size = (actual - expected).norm(), expected.norm()
    assert error <= tolerance * size, f"relative error {error / size:.2e} > {tolerance:.0e}"


def assert_bitwise(actual: Tensor, expected: Tensor) -> None:
    """Same type, shape and bits (NaN equals NaN)."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
