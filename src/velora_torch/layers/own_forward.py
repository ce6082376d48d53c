"""Subclasses of ``nn.Linear`` that bring a forward of their own.

The forward is theirs, step by step; only its products of an input and the whole weight are
computed by the compressed layer, with the same bits, and keep z = x v (T x G) instead of x.

Shapes: T tokens, D input features, G groups, O output features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from velora_torch.compiling import uncompiled
from velora_torch.layers.adapter_sites import LINEAR, MATMUL, operands
from velora_torch.layers.base import CompressedLayer
from velora_torch.recomputation.deferred import METADATA, plain
from velora_torch.subtoken.factored import ExposedWeight

TRANSPOSES: set[Any] = {
    torch.t,
    torch.transpose,
    torch.permute,
    Tensor.t,
    Tensor.transpose,
    Tensor.permute,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
}
_TOKENS = 3
"""Of the input on which a forward is tried."""
_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What somebody's forward may raise on an input that it does not expect."""


class CompressedOwnForward(CompressedLayer):
    """A linear layer with another forward; its weight is (O, D)."""

    transposed = False

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward; its products with the weight keep z instead of x."""
        args = tuple(plain(value) for value in args)
        with _TakeProducts(self):
            return self.plain_class.forward(self, *args, **kwargs)


def multiplies_by_weight(module: nn.Module) -> bool:
    """Whether a forward multiplies its input by the whole weight, and uses the weight nowhere else.

    Tries it, on a shallow copy and a few zeros; not where it has modules of its own, whose hooks
    would be told of an input that nobody gave.
    """
    weight = module._parameters.get("weight")
    if next(module.children(), None) is not None:
        return False
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return False
    x = weight.new_zeros(_TOKENS, weight.shape[1], requires_grad=False)  # fake beside a fake one
    uses = _FindUses(weight)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), uses:
            type(module).forward(copy.copy(module), x)
    except _ERRORS:
        return False
    return uses.products > 0 and not uses.others


class _TakeProducts(TorchFunctionMode):
    """Active while the forward of a compressed layer runs."""

    def __init__(self, layer: CompressedLayer) -> None:
        super().__init__()
        self._layer = layer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute a function, a product with the weight by the layer."""
        kwargs = kwargs or {}
        x, weight, bias = _product(func, args, kwargs)
        if x is not None and self._is_weight(weight, transposed=func in MATMUL):
            return self._layer.product(x, bias)
        return func(*args, **kwargs)

    def _is_weight(self, tensor: Tensor, transposed: bool) -> bool:
        raw = self._layer.raw_weight
        if not _is_whole(tensor, raw, transposed):
            return False
        node: Any = tensor.grad_fn
        if transposed and node is not None:
            node = node.next_functions[0][0]
        # With coefficients pending the layer shows a copy of its weight, and autograd knows whose.
        exposed = type(node) is ExposedWeight._backward_cls
        return (exposed and getattr(node, "layer", None) is self._layer) or _same_memory(
            tensor, raw
        )


class _FindUses(TorchFunctionMode):
    """Counts what a forward does with a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self.products = 0
        self.others = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute a function, and note whether it is a product with the weight, or another use."""
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(_same_memory(t, self._weight) for t in given):
            x, weight, _bias = _product(func, args, kwargs)
            if x is not None and _is_whole(weight, self._weight, transposed=func in MATMUL):
                self.products += 1
            elif func not in METADATA | TRANSPOSES:
                self.others = True
        return func(*args, **kwargs)


def _product(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor | None, Any, Tensor | None]:
    """x, weight and bias of a product of matrices; no x where a call is none."""
    found = operands(func, args, kwargs) if func in LINEAR | MATMUL else None
    return (None, None, None) if found is None else found[1:]


def _is_whole(tensor: Tensor, weight: Tensor, transposed: bool) -> bool:
    shape, stride = weight.shape, weight.stride()
    if transposed:
        shape, stride = shape[::-1], stride[::-1]
    return tensor.shape == shape and tensor.stride() == stride


def _same_memory(tensor: Tensor, weight: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    if tensor.untyped_storage()._cdata != weight.untyped_storage()._cdata:
        return False
    return bool(tensor.storage_offset() == weight.storage_offset())
