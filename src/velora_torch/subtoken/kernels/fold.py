"""Folding in one pass over the weight, on a CPU: the loops of `fold.c`.

PyTorch's operators (`velora_torch.subtoken.folding`) take seven for a bfloat16 weight, and more for
a float16 one, each a pass over memory.

Shapes: O output features, D input features, G groups, M features per sub-token.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from velora_torch.subtoken.kernels import library

SOURCE = Path(__file__).with_name("fold.c")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of `enum type` in `fold.c`."""
ALONE = 1 << 15
"""So many weights one thread has folded before others have begun."""
_operators_only = False


@contextlib.contextmanager
def operators_only() -> Iterator[None]:
    """Fold with PyTorch's operators while this is open, in every thread: to compare with."""
    global _operators_only
    before, _operators_only = _operators_only, True
    try:
        yield
    finally:
        _operators_only = before


def fold_native_(
    weight_OD: Tensor,
    coef_OG: Tensor,
    e_GM: Tensor,
    decay: float | Tensor,
    noise: tuple[Tensor, Tensor] | None,
) -> bool:
    """``W <- round(decay * W + coef (x) e)`` in place; False, and nothing done, where it cannot be.

    It can with a float32, bfloat16 or float16 weight on the CPU, stored as (O, D) or as (D, O)
    without gaps, where C can be compiled and nobody watches operators (a `TorchDispatchMode`, as
    count memory and FLOPs). Rounding and result are those of `folding`'s operators; where the CPU
    has no fused multiply-add, and where the last group is cut, float32 sums may differ from theirs
    in the last bit.

    Args:
        weight_OD: the weight, or a transposed view of it.
        coef_OG: coefficients, float32.
        e_GM: vectors, float32; features of the last group that the weight lacks are not used.
        decay: what the weight is multiplied by.
        noise: stochastic rounding of 16-bit weights: int32 numbers of the outputs, (O,), and of
            the features, (D,), in [0, 2^16), whose exclusive or decides; None: to nearest.
    """
    kind = TYPES.get(weight_OD.dtype)
    operands = (weight_OD, coef_OG, e_GM, *(noise or ()))
    if kind is None or {coef_OG.dtype, e_GM.dtype} != {torch.float32}:
        return False
    watched = _operators_only or _get_current_dispatch_mode() is not None
    if watched or not all(map(_has_memory, operands)):
        return False
    (outputs, features), (groups, size) = weight_OD.shape, e_GM.shape
    assert coef_OG.shape == (outputs, groups)
    assert features <= groups * size
    transposed = not weight_OD.is_contiguous()
    if transposed and not weight_OD.t().is_contiguous():
        return False
    fold = _function("fold_transposed" if transposed else "fold")
    if fold is None:
        return False
    coef = (coef_OG.t() if transposed else coef_OG).contiguous()
    inputs = [coef, e_GM.contiguous(), *(x.contiguous() for x in noise or ())]
    given = [weight_OD.data_ptr(), *(x.data_ptr() for x in inputs), *([] if noise else [None] * 2)]
    sizes = (outputs, features, size) if transposed else (outputs, features, groups, size)
    threads = torch.get_num_threads() if weight_OD.numel() > ALONE else 1
    fold(kind, *given, float(decay), *sizes, threads)
    torch.autograd.graph.increment_version(weight_OD)
    return True


def _has_memory(x: Tensor) -> bool:
    """Whether a tensor's numbers lie at an address of this process."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not x.is_inference()
    return plain and x.device.type == "cpu"


@functools.cache
def _function(name: str) -> Callable[..., Any] | None:
    found = library.load(SOURCE)
    if found is None:
        return None
    function = getattr(found, name)
    function.restype = None
    function.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 5,
        ctypes.c_float,
        *[ctypes.c_long] * (3 if "transposed" in name else 4),
        ctypes.c_int,
    ]
    return function
