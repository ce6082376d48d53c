"""Matrix products of half-precision numbers on CPUs that have no instructions for them.

PyTorch multiplies bfloat16 matrices with oneDNN where the CPU has AVX-512 or AMX, and with a loop
of its own where it has not (most laptops), at a thirtieth of the speed of float32 and less. Here
the operands are converted to float32, multiplied, and the result is rounded: what the instructions
compute, up to the order of additions. Weights, activations and gradients stay as small as they are;
a product takes the room of its float32 operands while it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_depth = 0
_library: torch.library.Library | None = None


def slow_types() -> tuple[torch.dtype, ...]:
    """The half-precision types that PyTorch multiplies on this CPU without oneDNN."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return tuple(dtype for dtype, has in supported.items() if not has())


@contextlib.contextmanager
def float32_products(types: tuple[torch.dtype, ...] | None = None) -> Iterator[None]:
    """Compute products of half-precision matrices on the CPU in float32 while this is open.

    `torch.mm`, `addmm`, `bmm` and `baddbmm`, and all that is made of them (linear layers, einsum,
    attention written out), and `scaled_dot_product_attention` (where PyTorch is new enough to have
    `torch.library.get_kernel`), forward and backward, in every thread of the process; other types
    and other devices are as before. Contexts may be nested; the types of the outermost count. Not
    seen by code that `torch.compile` has compiled.

    Args:
        types: which types; None: `slow_types`, which are none where the CPU is made for them.
    """
    global _depth, _library
    types = slow_types() if types is None else types
    if types and _depth == 0:
        _library = _register(types)
    _depth += bool(types)
    try:
        yield
    finally:
        _depth -= bool(types)
        if _depth == 0 and _library is not None:
            _library._destroy()
            _library = None


def are_float32() -> bool:
    """Whether `float32_products` is open for some type."""
    return _depth > 0


def _register(types: tuple[torch.dtype, ...]) -> torch.library.Library:
    # The `out` variants are PyTorch's own kernels still: calling them does not come back here.
    aten = torch.ops.aten
    library = torch.library.Library("aten", "IMPL")

    def into(
        kernel: Callable[..., Tensor], shape: tuple[int, ...], *given: Tensor, **scales: float
    ) -> Tensor:
        like = given[-1]
        if like.dtype not in types or any(t.dtype != like.dtype for t in given):
            return kernel(*given, **scales, out=like.new_empty(shape))
        out = torch.empty(shape, dtype=torch.float32)
        return kernel(*(t.float() for t in given), **scales, out=out).to(like.dtype)

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return into(aten.mm.out, (a.shape[0], b.shape[-1]), a, b)

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        return into(aten.bmm.out, (*a.shape[:2], b.shape[-1]), a, b)

    def addmm(c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        shape = (a.shape[0], b.shape[-1])
        return into(aten.addmm.out, shape, c, a, b, beta=beta, alpha=alpha)

    def baddbmm(c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        shape = (*a.shape[:2], b.shape[-1])
        return into(aten.baddbmm.out, shape, c, a, b, beta=beta, alpha=alpha)

    for name, kernel in (("mm", mm), ("bmm", bmm), ("addmm", addmm), ("baddbmm", baddbmm)):
        library.impl(name, kernel, "CPU")
    for packet in (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    ):
        if attention := _attention(packet.default, types):
            library.impl(packet.default, attention, "CPU")
    return library


def _attention(
    operator: torch._ops.OpOverload, types: tuple[torch.dtype, ...]
) -> Callable[..., tuple[Tensor, ...]] | None:
    """The operator, or its backward, through float32; None where PyTorch hands out no kernels."""
    get_kernel = getattr(torch.library, "get_kernel", None)
    if get_kernel is None:
        return None
    plain = get_kernel(operator, "CPU")  # taken before it is covered: it does not come back here
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def attention(*given: Any, attn_mask: Tensor | None = None, **scale: Any) -> tuple[Tensor, ...]:
        dtype = given[0].dtype
        if dtype not in types:
            return plain.call_boxed(keys, *given, attn_mask=attn_mask, **scale)

        def widen(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.dtype == dtype else x

        results = plain.call_boxed(keys, *map(widen, given), attn_mask=widen(attn_mask), **scale)
        if operator.name().endswith("_backward"):
            return tuple(grad.to(dtype) for grad in results)
        output, logsumexp = results  # which is float32 for half-precision inputs too
        return output.to(dtype), logsumexp

    return attention
