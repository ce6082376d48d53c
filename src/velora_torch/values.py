"""Tensors with and without numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at: it is neither on meta nor fake."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_identity(x: Tensor) -> bool:
    """Whether x is an identity matrix that nobody differentiates: rows of it are no tokens.

    Looks at the numbers only where shape and graph leave the question open. While a graph is being
    compiled there are none, and the answer is no.
    """
    if x.dim() != 2 or x.shape[0] != x.shape[1] or x.requires_grad:
        return False
    if torch.compiler.is_compiling() or not has_values(x):
        return False
    return torch.equal(x, torch.eye(len(x), dtype=x.dtype, device=x.device))
