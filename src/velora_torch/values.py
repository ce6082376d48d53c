"""Tensors with and without numbers."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at: it is neither on meta nor fake."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
