"""Folding in one pass over the weight, on a CPU: the loops of `fold.c`.

It takes seven of PyTorch's operators for a 16-bit weight (`velora_torch.subtoken.folding`), each
a pass over memory.

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
NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
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

    It can with a bfloat16 or float32 weight on the CPU, stored as (O, D) or as (D, O) without gaps,
    where C can be compiled and nobody watches operators (a `TorchDispatchMode`, as count memory
    and FLOPs). Rounding and result are those of `folding`'s operators; where the
    CPU has no fused multiply-add, and where the last group is cut, float32 sums may differ from
    theirs in the last bit.

    Args:
        weight_OD: the weight, or a transposed view of it.
        coef_OG: coefficients, float32.
        e_GM: vectors, float32; features of the last group that the weight lacks are not used.
        decay: what the weight is multiplied by.
        noise: stochastic rounding of bfloat16: int32 numbers of the outputs, (O,), and of the
            features, (D,), in [0, 2^16), whose exclusive or is added; None: to nearest.
    """
    name = NAMES.get(weight_OD.dtype)
    operands = (weight_OD, coef_OG, e_GM, *(noise or ()))
    if name is None or {coef_OG.dtype, e_GM.dtype} != {torch.float32}:
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
    fold = _function(f"fold_transposed_{name}" if transposed else f"fold_{name}")
    if fold is None:
        return False
    coef = (coef_OG.t() if transposed else coef_OG).contiguous()
    inputs = [coef, e_GM.contiguous()]
    given: list[int | None] = [x.data_ptr() for x in inputs]
    if name == "bf16":
        drawn = [x.contiguous() for x in noise or ()]
        given += [x.data_ptr() for x in drawn] or [None, None]
    sizes = (outputs, features, size) if transposed else (outputs, features, groups, size)
    threads = torch.get_num_threads() if weight_OD.numel() > ALONE else 1
    fold(weight_OD.data_ptr(), *given, float(decay), *sizes, threads)
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
    half, across = name.endswith("bf16"), "transposed" in name
    function.restype = None
    function.argtypes = [
        *[ctypes.c_void_p] * (5 if half else 3),
        ctypes.c_float,
        *[ctypes.c_long] * (3 if across else 4),
        ctypes.c_int,
    ]
    return function
