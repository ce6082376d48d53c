"""The loss of a language model in chunks of rows: the logits never exist as a whole.

    loss = cross_entropy(h Wᵀ + b, target)    keeps h and W, instead of the logits

The logits of a chunk are computed in the forward pass and again in the backward pass, which costs
one more product with W. ``torch.nn.functional.linear_cross_entropy`` does without it, by keeping
the gradients that it has computed in the forward pass. It is not used here (torch 2.14): its loss
has the type of h, two or three digits in bfloat16, where models compute theirs in float32; what
it keeps is invisible to ``saved_tensors_hooks``; gradients in float16 exist before the loss is
scaled; autocast is ignored; and ``create_graph=True`` gives gradients without a graph, silently.

Shapes: T rows (tokens), D features, V classes (vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F

from velora_torch.recomputation.deferred import Deferred, Recipe, compact, defer, plain
from velora_torch.recomputation.replay import Autocast, can_replay, is_ordinary, replay
from velora_torch.swap import Swapped

MIN_ROWS = 256
"""Rows of a chunk, at least: fewer would keep a GPU waiting."""

CASTS = {Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type}
VIEWS = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}


class DeferringHead(Swapped):
    """An output head (``nn.Linear``) whose logits are computed where they are used."""

    kind = "chunked loss"
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """The logits, deferred in a training forward."""
        x = plain(x)
        sources = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        autocast = Autocast.of(x)
        same = autocast.enabled or len({t.dtype for t in sources}) == 1
        if not (self.training and x.dim() > 1 and same and can_replay(*sources)):
            return super().forward(x)
        dtype = autocast.matmul_dtype(x.dtype)
        layout = compact((*x.shape[:-1], self.weight.shape[0]), dtype)
        return defer(Logits((dtype,), autocast), sources, layout)


def why_not_chunked(head: nn.Module) -> str | None:
    """Why the loss of an output head cannot be computed in chunks; ``None`` if it can."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"the output head is not a plain linear layer but {type(head).__name__}"
    if "forward" in head.__dict__:
        return "the forward of the output head was replaced on this instance"
    if "weight" not in head._parameters:
        return "the weight of the output head is computed by a parametrization"
    return None


@dataclass(frozen=True)
class Logits(Recipe):
    """``h Wᵀ + b`` for all classes, cast to one type after the other."""

    dtypes: tuple[torch.dtype, ...]
    autocast: Autocast

    def compute(self, *sources: Tensor) -> Tensor:
        """By the arithmetic of the original head."""
        with self.autocast.again():
            logits = F.linear(*sources)
        for dtype in self.dtypes[1:]:
            logits = logits.to(dtype)
        return logits

    def to_head(self, dlogits: Tensor) -> Tensor:
        """The gradient in the head's own output."""
        for dtype in reversed(self.dtypes):
            dlogits = dlogits.to(dtype)
        return dlogits

    def gradients(
        self, sources: Sequence[Tensor], needs: Sequence[bool], grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Those of a linear layer: the logits are not needed again."""
        if torch.is_grad_enabled():
            return replay(self.compute, sources, needs, grad_output)
        h, weight, *bias = sources
        dY_TV = self.to_head(grad_output).reshape(-1, weight.shape[0])
        dh = dW = None
        if needs[0]:
            dh = (dY_TV @ weight.to(dY_TV.dtype)).view(h.shape).to(h.dtype)
        if needs[1]:
            dW = (dY_TV.t() @ h.reshape(-1, h.shape[-1]).to(dY_TV.dtype)).to(weight.dtype)
        db = [
            dY_TV.sum(0).to(b.dtype) if need else None
            for b, need in zip(bias, needs[2:], strict=True)
        ]
        return (dh, dW, *db)

    def handle(
        self, func: Any, tensor: Deferred, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Casts, views and slices that leave rows whole, and the loss."""
        if not args or args[0] is not tensor:
            return NotImplemented
        if func is F.cross_entropy:
            return _cross_entropy(self, tensor, *args[1:], **kwargs)
        if func in CASTS:
            return _cast(self, func, tensor, args[1:], kwargs)
        if func is Tensor.contiguous and not kwargs:
            return _contiguous(self, tensor)
        if func in VIEWS:
            return _view(self, func, tensor, args[1:], kwargs)
        if func is Tensor.__getitem__:
            return _rows(self, tensor, args[1])
        return NotImplemented


# ------------------------------------------------------------------ on the way to the loss


def _cast(
    recipe: Logits, func: Any, tensor: Deferred, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if kwargs.get("copy") or any(isinstance(a, Deferred) for a in args):
        return NotImplemented
    sample = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    cast = func(sample, *args, **kwargs)
    if not isinstance(cast, Tensor):  # .type() gives a name
        return cast
    if cast.device != tensor.device:
        return NotImplemented
    if cast.dtype == tensor.dtype:
        return tensor
    if not cast.is_floating_point():
        return NotImplemented
    wider = replace(recipe, dtypes=(*recipe.dtypes, cast.dtype))
    return defer(wider, tensor.sources, tensor.twin().to(cast.dtype))


def _contiguous(recipe: Logits, tensor: Deferred) -> Any:
    if tensor.is_contiguous():
        return tensor
    h, *head = tensor.sources
    return defer(recipe, (h.contiguous(), *head), tensor.twin().contiguous())


def _view(
    recipe: Logits, func: Any, tensor: Deferred, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if any(isinstance(argument, torch.dtype) for argument in (*args, *kwargs.values())):
        return NotImplemented
    layout = func(tensor.twin(), *args, **kwargs)
    if layout.dim() < 2 or layout.shape[-1] != tensor.shape[-1]:
        return NotImplemented
    h, *head = tensor.sources
    shape = (*layout.shape[:-1], h.shape[-1])
    rows = h.view(shape) if func is Tensor.view else h.reshape(shape)
    if not layout._is_view():  # reshape has copied
        return defer(recipe, (rows, *head), layout)
    return defer(recipe, (rows, *head), layout, tensor, lambda value: func(value, *args, **kwargs))


def _rows(recipe: Logits, tensor: Deferred, index: Any) -> Any:
    """``logits[index]`` for an index that takes or leaves whole rows."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(type(part) in (int, slice, EllipsisType) for part in parts):
        return NotImplemented
    given = [part for part in parts if part is not ...]
    names_last = len(given) == tensor.dim() or (len(given) < len(parts) and parts[-1] is not ...)
    if names_last and parts[-1] != slice(None):
        return NotImplemented
    layout = tensor.twin()[index]
    if layout.dim() < 2:
        return NotImplemented
    h, *head = tensor.sources
    return defer(recipe, (h[index], *head), layout, tensor, lambda value: value[index])


# ------------------------------------------------------------------ the loss


@dataclass(frozen=True)
class _Settings:
    """What ``cross_entropy`` was asked for."""

    recipe: Logits
    ignore_index: int
    reduction: str
    label_smoothing: float

    def loss(self, logits: Tensor, target: Tensor, class_weight: Tensor | None) -> Tensor:
        """The loss of some rows, summed (or of each row)."""
        with self.recipe.autocast.again():
            return F.cross_entropy(
                logits,
                target,
                class_weight,
                ignore_index=self.ignore_index,
                reduction="none" if self.reduction == "none" else "sum",
                label_smoothing=self.label_smoothing,
            )

    def divisor(self, target: Tensor, class_weight: Tensor | None, like: Tensor) -> Tensor:
        """What the mean divides by."""
        counted = target != self.ignore_index
        if class_weight is None:
            return counted.sum().to(like.dtype)
        known = target.where(counted, 0)
        return (class_weight[known] * counted).sum().to(like.dtype)


def _cross_entropy(
    recipe: Logits,
    tensor: Deferred,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    usual = size_average is None and reduce is None and reduction in ("mean", "sum", "none")
    if (
        not usual
        or tensor.dim() != 2
        or not is_ordinary(target)
        or not is_ordinary(tensor.sources[0])
    ):
        return NotImplemented
    if target.is_floating_point() or target.shape != tensor.shape[:1]:
        return NotImplemented
    if target.device != tensor.device or (weight is not None and weight.requires_grad):
        return NotImplemented
    settings = _Settings(recipe, ignore_index, reduction, label_smoothing)
    h, head, *bias = tensor.sources
    return _Chunked.apply(settings, target, weight, h, head, bias[0] if bias else None)


class _Chunked(Function):
    """Cross-entropy of a linear layer, in chunks of rows in both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        target_T: Tensor,
        class_weight_V: Tensor | None,
        h_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
    ) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(target_T, class_weight_V, h_TD, weight_VD, bias_V)
        cast = _cast_head(settings, weight_VD, bias_V)
        losses = []
        for rows in chunks(h_TD.shape[0], *weight_VD.shape):
            logits = settings.recipe.compute(h_TD[rows], *cast)
            losses.append(settings.loss(logits, target_T[rows], class_weight_V))
        if settings.reduction == "none":
            return torch.cat(losses)
        total = torch.stack(losses).sum()
        if settings.reduction == "mean":
            total = total / settings.divisor(target_T, class_weight_V, total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        target, class_weight, h, *head = ctx.saved_tensors
        settings, needs = ctx.settings, ctx.needs_input_grad[3:]
        (dloss,) = grad_outputs
        if settings.reduction == "mean":
            dloss = dloss / settings.divisor(target, class_weight, dloss)
        if torch.is_grad_enabled():

            def compute(*sources: Tensor) -> Tensor:
                return settings.loss(settings.recipe.compute(*sources), target, class_weight)

            sources = [t for t in (h, *head) if t is not None]
            found = replay(compute, sources, needs[: len(sources)], dloss)
            return (None, None, None, *found, *(None for _ in range(3 - len(found))))
        return (
            None,
            None,
            None,
            *_gradients(settings, dloss, target, class_weight, h, head, needs),
        )


def _gradients(
    settings: _Settings,
    dloss: Tensor,
    target_T: Tensor,
    class_weight_V: Tensor | None,
    h_TD: Tensor,
    head: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    weight_VD, bias_V = head
    assert weight_VD is not None
    cast = _cast_head(settings, weight_VD, bias_V)
    wide = torch.promote_types(cast[0].dtype, torch.float32)
    dh_TD = torch.empty_like(h_TD) if needs[0] else None
    # Sums over chunks, which would lose digits in half precision.
    dW_VD = torch.zeros_like(weight_VD, dtype=wide) if needs[1] else None
    db_V = torch.zeros(weight_VD.shape[0], dtype=wide, device=h_TD.device) if needs[2] else None
    for rows in chunks(h_TD.shape[0], *weight_VD.shape):
        logits = settings.recipe.compute(h_TD[rows], *cast).requires_grad_()
        with torch.enable_grad():
            loss = settings.loss(logits, target_T[rows], class_weight_V)
        (dlogits,) = torch.autograd.grad(
            loss, logits, dloss[rows] if settings.reduction == "none" else dloss
        )
        dY_TV = settings.recipe.to_head(dlogits)
        if dh_TD is not None:
            dh_TD[rows] = dY_TV @ cast[0]
        if dW_VD is not None:
            h = h_TD[rows].to(dY_TV.dtype)
            if wide == dY_TV.dtype:
                dW_VD.addmm_(dY_TV.t(), h)
            else:
                dW_VD += dY_TV.t() @ h
        if db_V is not None:
            db_V += dY_TV.sum(0)
    dW = None if dW_VD is None else dW_VD.to(weight_VD.dtype)
    db = None if db_V is None or bias_V is None else db_V.to(bias_V.dtype)
    return dh_TD, dW, db


def _cast_head(settings: _Settings, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The head in the type that it computes in, cast once for all chunks."""
    dtype = settings.recipe.dtypes[0]
    return [t.detach().to(dtype) for t in (weight, bias) if t is not None]


def chunks(rows: int, classes: int, features: int) -> Iterator[slice]:
    """Slices of rows, so that the logits of a chunk are about as large as all of h (T x D).

    At least one, which may be empty.
    """
    size = max(MIN_ROWS, -(-rows * features // classes))
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))
