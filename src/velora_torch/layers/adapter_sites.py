"""Where an adapter multiplies its input by something that is trained.

:class:`FindProducts` watches the forward of one adapter and hands every such product to a
callback. An operand is *trained* if autograd leads from it to parameters of the adapter alone; it
is an *activation* if autograd leads from it to the adapter's input, or, where the input needs no
gradient, if it was computed from the input.

Shapes: T tokens, D features of the activation, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

LINEAR = frozenset({F.linear})
MATMUL = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})
REVERSED_MATMUL = frozenset({Tensor.__rmatmul__})
SCALE = frozenset({torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__,
                   Tensor.__rmul__})  # fmt: skip
PRODUCTS = LINEAR | MATMUL | REVERSED_MATMUL | SCALE
MAX_NODES = 10_000
"""Graph nodes that are looked at for one operand: weights are made of a few dozen."""


@dataclass(frozen=True)
class Product:
    """An activation times a trained operand."""

    kind: str
    """``linear`` (x Wᵀ + b, W is O x D), ``matmul`` (x W, W is D x O) or ``scale`` (x * s)."""
    x: Tensor
    operand: Tensor
    bias: Tensor | None
    leaves: frozenset[int]
    """Ids of the parameters that the operand is computed from."""

    @property
    def features(self) -> int:
        """D."""
        return self.x.shape[-1]

    @property
    def outputs(self) -> int:
        """O; D for a scale."""
        if self.kind == "scale":
            return self.features
        return self.operand.shape[0 if self.kind == "linear" else 1]


class FindProducts(TorchFunctionMode):
    """Active while an adapter's forward runs.

    Args:
        parameters: the adapter's parameters.
        take: called for each product with the function that computes it; returns the result, or
            ``None`` to leave the product alone.
    """

    def __init__(
        self,
        parameters: Iterator[nn.Parameter],
        take: Callable[[Product], Tensor | None],
    ) -> None:
        super().__init__()
        self._parameters = {id(p) for p in parameters}
        self._take = take
        self._marker: Any = None
        self._from_input: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def mark(self, x: Tensor) -> Tensor:
        """The adapter's input, so that it is known again."""
        if x.requires_grad:
            x = x.view_as(x)
            self._marker = x.grad_fn
        else:
            self._from_input[x] = True
        return x

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute a function, a product with a trained operand by the callback."""
        kwargs = kwargs or {}
        result = None
        if func in PRODUCTS and torch.is_grad_enabled():
            product = self._product(func, args, kwargs)
            result = None if product is None else self._take(product)
        if result is None:
            result = func(*args, **kwargs)
        self._follow(args, kwargs, result)
        return result

    def _follow(self, args: Any, kwargs: Any, result: Any) -> None:
        """An input that needs no gradient is in no graph: remember what is made from it."""
        if self._marker is not None:
            return
        if isinstance(result, Tensor) and result.dim() > 1:
            given = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            if any(t in self._from_input for t in given):
                self._from_input[result] = True

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Product | None:
        found = operands(func, args, kwargs)
        if found is None:
            return None
        kind, x, operand, bias = found
        if kind == "scale" and not _scales(x, operand):
            x, operand = operand, x
        if not _fits(kind, x, operand):
            return None
        leaves = self._leaves(operand)
        if not leaves or not self._is_activation(x):
            return None
        return Product(kind, x, operand, bias, leaves)

    def _is_activation(self, x: Tensor) -> bool:
        if self._marker is None:
            return x in self._from_input
        return x.requires_grad and self._search(x) is None

    def _leaves(self, operand: Tensor) -> frozenset[int] | None:
        """Ids of the parameters that a trained operand comes from; ``None`` for others."""
        if not operand.requires_grad or operand in self._from_input:
            return None
        found = self._search(operand)
        return found if found and found <= self._parameters else None

    def _search(self, tensor: Tensor) -> frozenset[int] | None:
        """Ids of the leaves below a tensor; ``None`` if the adapter's input is among them."""
        if tensor.grad_fn is None:
            return frozenset({id(tensor)})
        seen, waiting, leaves = {tensor.grad_fn}, [tensor.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is self._marker or len(seen) > MAX_NODES:
                return None
            variable = getattr(node, "variable", None)
            if variable is not None:
                leaves.add(id(variable))
            for below, _ in node.next_functions:
                if below is not None and below not in seen:
                    seen.add(below)
                    waiting.append(below)
        return frozenset(leaves)


def operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Tensor, Tensor, Tensor | None] | None:
    """(kind, activation, operand, bias), as far as the call's form tells."""
    names = ("input", "weight", "bias") if func in LINEAR else ("input", "other")
    if len(args) > len(names) or not set(kwargs) <= set(names):
        return None  # out=, or a form that is not known
    values = dict(zip(names, args, strict=False)) | kwargs
    first, second = values.get("input"), values.get(names[1])
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return None
    if func in LINEAR:
        return "linear", first, second, values.get("bias")
    if func in MATMUL:
        return "matmul", first, second, None
    if func in REVERSED_MATMUL:
        return "matmul", second, first, None
    return "scale", first, second, None


def _scales(x: Tensor, s: Tensor) -> bool:
    """Whether s could be a scale of the features of x."""
    features = s.shape[-1] if s.dim() else 0
    return (
        x.dim() > 1
        and s.dim() <= x.dim()
        and features > 1
        and (s.numel() == features == x.shape[-1] and x.numel() != s.numel())
    )


def _fits(kind: str, x: Tensor, operand: Tensor) -> bool:
    if not (x.is_floating_point() and operand.is_floating_point()):
        return False
    if kind == "scale":
        return _scales(x, operand)
    return operand.dim() == 2 and x.dim() >= 2
