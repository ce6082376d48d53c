"""Activations, and their products with a gate, that are computed again in the backward pass.

y = act(g) * u          keeps g, u          instead of g, act(g), u
y = W act(g) + b        keeps g             instead of g, act(g)
y = W (act(g) * u) + b  keeps g, u          instead of g, act(g), u, act(g) * u
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F

from velora_torch.recomputation.deferred import Deferred, Recipe, compact, defer, plain
from velora_torch.recomputation.replay import (
    Autocast,
    gradients,
    is_ordinary,
    leaves,
    replay,
    run_with,
)

PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
VIEWS = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}


class Activation(Recipe):
    """``act(g)`` for an activation module."""

    def __init__(self, module: nn.Module, kind: type[nn.Module], autocast: Autocast) -> None:
        self.module, self.kind, self.autocast = module, kind, autocast

    def compute(self, *sources: Tensor) -> Tensor:
        """By the module's own forward."""
        with self.autocast.again():
            return run_with(self.module, self.kind, self.module._parameters, sources[0])

    def handle(
        self, func: Any, tensor: Deferred, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Products, linear layers, and views on the way to them."""
        if func in PRODUCTS and not kwargs and len(args) == 2:
            other = plain(args[1] if args[0] is tensor else args[0])
            if _alike(tensor, other):
                return defer(Gated(self), (*tensor.sources, other), tensor.twin())
        return _handle(self, func, tensor, args, kwargs)


class Gated(Recipe):
    """``act(g) * u``."""

    def __init__(self, activation: Activation) -> None:
        self.activation, self.autocast = activation, activation.autocast

    def compute(self, *sources: Tensor) -> Tensor:
        """Activation, then product."""
        return self.activation.compute(sources[0]) * sources[1]

    def gradients(
        self, sources: Sequence[Tensor], needs: Sequence[bool], grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        """dg = act'(g) (dy u), du = dy act(g)."""
        if torch.is_grad_enabled():
            return replay(self.compute, sources, needs, grad_output)
        g, u = sources
        with torch.enable_grad():
            (leaf,) = leaves([g], needs[:1], keep_graph=False)
            activated = self.activation.compute(leaf)
        du = grad_output * activated.detach() if needs[1] else None
        dg = None
        if needs[0]:
            (dg,) = gradients(activated, [leaf], [True], grad_output * u)
        return dg, du

    def handle(
        self, func: Any, tensor: Deferred, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Linear layers, and views on the way to them."""
        return _handle(self, func, tensor, args, kwargs)


def _handle(
    recipe: Activation | Gated,
    func: Any,
    tensor: Deferred,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not args:
        return NotImplemented
    if func is F.linear and args[0] is tensor:
        return _linear(recipe, tensor, *args[1:], **kwargs)
    if func is torch.addmm and not kwargs and len(args) == 3 and args[1] is tensor:
        return _addmm(recipe, tensor, args[0], args[2])
    if func is Tensor.contiguous and len(args) == 1 and not kwargs:
        return tensor
    if func is Tensor.to and _changes_nothing(tensor, args, kwargs):
        return tensor
    if func is F.dropout and args[0] is tensor and _drops_nothing(*args[1:], **kwargs):
        return tensor
    if func in VIEWS and args[0] is tensor:
        return _view(recipe, func, tensor, args[1:], kwargs)
    return NotImplemented


def _linear(
    recipe: Activation | Gated, tensor: Deferred, weight: Any, bias: Tensor | None = None
) -> Any:
    if not _fits(tensor, weight, bias) or weight.dim() != 2 or tensor.dim() < 2:
        return NotImplemented
    return _Linear.apply(recipe, False, weight, bias, *tensor.sources)


def _addmm(recipe: Activation | Gated, tensor: Deferred, bias: Any, weight: Any) -> Any:
    if not isinstance(bias, Tensor) or bias.dim() != 1 or not _fits(tensor, weight, bias):
        return NotImplemented
    return _Linear.apply(recipe, True, weight, bias, *tensor.sources)


def _view(
    recipe: Recipe, func: Any, tensor: Deferred, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if any(isinstance(argument, torch.dtype) for argument in (*args, *kwargs.values())):
        return NotImplemented
    layout = func(tensor.twin(), *args, **kwargs)
    sources = tuple(func(source, *args, **kwargs) for source in tensor.sources)
    return defer(recipe, sources, layout, tensor, lambda value: func(value, *args, **kwargs))


def _alike(tensor: Deferred, other: Any) -> bool:
    return (
        isinstance(other, Tensor)
        and is_ordinary(other)
        and (other.shape, other.dtype, other.device) == (tensor.shape, tensor.dtype, tensor.device)
        and other.is_contiguous()
    )


def _fits(tensor: Deferred, weight: Any, bias: Any) -> bool:
    """Whether an ordinary matrix product of these types is meant."""
    if not all(t is None or (isinstance(t, Tensor) and is_ordinary(t)) for t in (weight, bias)):
        return False
    autocast = Autocast.of(weight)
    if autocast.enabled:
        return True
    return tensor.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)


def _changes_nothing(tensor: Deferred, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``tensor.to(...)`` returns the tensor itself."""
    if args[0] is not tensor or kwargs.get("copy") or not set(kwargs) <= {"dtype", "non_blocking"}:
        return False
    wanted = [*args[1:], *kwargs.values()]
    return all(w in (tensor.dtype, tensor.device, False, None) for w in wanted if not _is_tensor(w))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _drops_nothing(p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return not inplace and (p == 0.0 or not training)


class _Linear(Function):
    """``y = W f(sources) + b`` that keeps the sources and W, and computes f again for dW."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Activation | Gated,
        transposed: bool,
        weight: Tensor,
        bias: Tensor | None,
        *sources: Tensor,
    ) -> Tensor:
        ctx.recipe, ctx.transposed = recipe, transposed
        ctx.autocast = Autocast.of(weight)
        ctx.save_for_backward(weight, bias, *sources)
        return _product(transposed, recipe.compute(*sources), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dY,) = grad_outputs
        if torch.is_grad_enabled():
            return (None, None, *_differentiable(ctx, dY))
        weight, bias, *sources = ctx.saved_tensors
        needs_weight, needs_bias, *needs = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = leaves(sources, needs, keep_graph=False)
            value = ctx.recipe.compute(*inputs)
        dY_TO = dY.reshape(-1, dY.shape[-1])
        dW = db = None
        if needs_weight:
            x_TD = value.detach().reshape(-1, value.shape[-1]).to(dY.dtype)
            dW = (x_TD.t() @ dY_TO if ctx.transposed else dY_TO.t() @ x_TD).to(weight.dtype)
        if needs_bias:
            db = dY_TO.sum(0).to(bias.dtype)
        dX = None
        if any(needs):
            cast = weight.to(dY.dtype)
            dX_TD = dY_TO @ (cast.t() if ctx.transposed else cast)
            dX = dX_TD.view(value.shape).to(value.dtype)
            return (None, None, dW, db, *gradients(value, inputs, needs, dX))
        return (None, None, dW, db, *(None for _ in needs))


def _product(transposed: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if transposed:
        assert bias is not None
        return torch.addmm(bias, x, weight)
    return F.linear(x, weight, bias)


def _differentiable(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions of everything, for ``create_graph=True``."""
    saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[2:]
    given = [t for t in saved if t is not None]

    def compute(*tensors: Tensor) -> Tensor:
        weight, *rest = tensors
        bias = rest.pop(0) if saved[1] is not None else None
        with ctx.autocast.again():
            return _product(ctx.transposed, ctx.recipe.compute(*rest), weight, bias)

    wanted = [need for need, t in zip(needs, saved, strict=True) if t is not None]
    found = iter(replay(compute, given, wanted, dY))
    return tuple(None if t is None else next(found) for t in saved)


def activation_layout(x: Tensor, recipe: Activation) -> Tensor:
    """The layout of an activation's result, whose type autocast may decide."""
    dtype = x.dtype
    if recipe.autocast.enabled:
        with torch.no_grad():
            dtype = recipe.compute(x.detach().new_empty(0)).dtype
    return compact(x.shape, dtype)
