"""Tensors that are computed when they are used: of the operators that follow, some need less.

A deferred tensor has a shape, a type and a place in the autograd graph, but no numbers. It knows
a :class:`Recipe` and the tensors it is computed from. Operators that the recipe knows take those
instead; all others get the plain tensor, computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.utils import _pytree as pytree

from velora_torch.compiling import uncompiled
from velora_torch.recomputation.replay import replay


class Recipe:
    """How a deferred tensor is computed. Holds no tensors: graph nodes keep recipes."""

    def compute(self, *sources: Tensor) -> Tensor:
        """The value, by the arithmetic of the original forward."""
        raise NotImplementedError

    def gradients(
        self, sources: Sequence[Tensor], needs: Sequence[bool], grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients in the sources."""
        return replay(self.compute, sources, needs, grad_output)

    def handle(
        self, func: Any, tensor: Deferred, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result of an operator without the value; ``NotImplemented`` where it is needed."""
        return NotImplemented


class Deferred(Tensor):
    """A tensor without numbers of its own; made by :func:`defer`."""

    recipe: Recipe
    sources: tuple[Tensor, ...]
    _versions: list[int]
    _plain: Tensor | None
    _unchanged: int
    _followed: int
    _watched: bool
    _parent: Deferred | None
    _from_parent: Callable[[Tensor], Tensor] | None

    @staticmethod
    def __new__(cls, layout: Tensor, device: torch.device) -> Deferred:
        """A wrapper with the shape, strides and type of a tensor on the meta device."""
        return torch.Tensor._make_wrapper_subclass(
            cls, layout.shape, strides=layout.stride(), dtype=layout.dtype, device=device
        )

    def twin(self) -> Tensor:
        """A tensor on the meta device with this shape, these strides and this type."""
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")

    def is_free(self) -> bool:
        """Whether operators may still take the sources instead of the value."""
        if self._watched or (self._parent is not None and not self._parent.is_free()):
            return False
        return not self._was_changed()

    def _was_changed(self) -> bool:
        """Whether the value was changed in place since it was computed."""
        if self._parent is not None and self._parent._was_changed():
            return True
        return self._plain is not None and self._plain._version != self._unchanged

    def plain(self) -> Tensor:
        """The value as a plain tensor in the autograd graph: always the same one."""
        if self._plain is None:
            if torch.is_inference_mode_enabled():
                return self.value()
            with torch.enable_grad():
                if self._parent is None or self._from_parent is None or self._watched:
                    self._plain = _Unwrap.apply(self)
                else:
                    self._plain = self._from_parent(self._parent.plain())
            assert self._plain is not None
            self._unchanged = self._plain._version
            self._followed = -1 if self._was_changed() else self._unchanged
        return self._plain if torch.is_grad_enabled() else self._plain.detach()

    def value(self) -> Tensor:
        """The numbers, without a graph."""
        if [source._version for source in self.sources] != self._versions:
            raise RuntimeError(
                "velora_torch.recompute: the result of an activation or output head is asked for "
                "after an input of it, or its weight, was changed in place. Use the result before "
                "the optimizer's step, or exclude it: recompute(..., activations=False, loss=False)"
            )
        with torch.no_grad():
            value = self.recipe.compute(*(source.detach() for source in self.sources))
        assert (value.shape, value.dtype) == (self.shape, self.dtype), "a recipe gone wrong"
        return value

    def _below_autograd(self) -> Tensor:
        """The numbers for an operator that torch calls without asking ``__torch_function__``."""
        if not self._was_changed():
            return self.value() if self._plain is None else self._plain.detach()
        self._check_followed()
        return self.plain().detach()

    def _check_followed(self) -> None:
        if self._was_changed() and (self._plain is None or self._plain._version != self._followed):
            raise RuntimeError(
                "velora_torch.recompute: the result of an activation or output head was changed "
                "in place through a view of it, and then given to a custom autograd function, or "
                "read under no_grad. Use .clone() before changing it, or exclude it: "
                "recompute(..., activations=False, loss=False)"
            )

    def _follow(self) -> None:
        """Let autograd know what was changed in place, for those who see only the wrapper."""
        if self._was_changed():
            value = self.plain()
            if value._version != self._followed:
                self._followed = value._version
                with torch._C.DisableTorchFunctionSubclass():
                    _Follow.apply(self, value)

    @classmethod
    @uncompiled
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer without the value where possible, and go on with the plain tensor elsewhere."""
        kwargs = kwargs or {}
        if func in METADATA or func in WATCHING:
            if func in WATCHING:
                args[0]._watched = True
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in ALIASES:
            args[0]._watched = True
        deferred = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Deferred)]
        records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        for tensor in deferred:
            if not records:
                tensor._check_followed()
            elif tensor.is_free():
                result = tensor.recipe.handle(func, tensor, args, kwargs)
                if result is not NotImplemented:
                    return result
        args, kwargs = pytree.tree_map(plain, (args, kwargs))
        result = func(*args, **kwargs)
        for tensor in deferred:
            if records:
                tensor._follow()
            elif tensor._plain is not None:  # changes without a graph
                tensor._followed = tensor._plain._version
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The way of whatever does not ask ``__torch_function__``, as custom functions."""
        kwargs = kwargs or {}
        _check_reads(func, args, kwargs)

        def number(tensor: Any) -> Any:
            return tensor._below_autograd() if isinstance(tensor, Deferred) else tensor

        args, kwargs = pytree.tree_map(number, (args, kwargs))
        return func(*args, **kwargs)


def _check_reads(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse operators that write into a deferred tensor behind ``__torch_function__``."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        kwargs = {**kwargs, argument.name: value}
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        values = pytree.tree_leaves(kwargs.get(argument.name))
        if written and any(isinstance(value, Deferred) for value in values):
            raise RuntimeError(
                f"velora_torch.recompute: {func} would write into the result of an activation or "
                f"output head that is computed when it is used. Give it a .clone(), or exclude "
                f"the result: recompute(..., activations=False, loss=False)"
            )


def defer(
    recipe: Recipe,
    sources: tuple[Tensor, ...],
    layout: Tensor,
    parent: Deferred | None = None,
    view: Callable[[Tensor], Tensor] | None = None,
) -> Deferred:
    """A tensor computed from sources when it is needed.

    Args:
        recipe: how.
        sources: from what, with their graphs.
        layout: shape, strides and type, on the meta device.
        parent: the deferred tensor that this one is a view of, and ...
        view: ... how it is made from it.
    """
    tensor: Deferred = _Compute.apply(recipe, layout, *sources)
    tensor.recipe, tensor.sources = recipe, sources
    tensor._versions = [source._version for source in sources]
    tensor._plain, tensor._unchanged, tensor._followed, tensor._watched = None, 0, 0, False
    tensor._parent, tensor._from_parent = parent, view
    return tensor


def plain(tensor: Any) -> Any:
    """The plain tensor of a deferred one; anything else as it is."""
    return tensor.plain() if isinstance(tensor, Deferred) else tensor


def compact(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The layout of a contiguous tensor."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


class _Compute(Function):
    """A deferred tensor in the graph: keeps the sources, and computes again to differentiate."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, layout: Tensor, *sources: Tensor) -> Deferred:
        ctx.recipe = recipe
        ctx.save_for_backward(*sources)
        return Deferred(layout, sources[0].device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        return (None, None, *ctx.recipe.gradients(ctx.saved_tensors, needs, grad_outputs[0]))


class _Unwrap(Function):
    """From a deferred tensor to its value; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, tensor: Deferred) -> Tensor:
        return tensor.value()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class _Follow(Function):
    """The wrapper in the graph anew: from now on it stands where its changed value stands."""

    @staticmethod
    def forward(ctx: Any, tensor: Deferred, value: Tensor) -> Deferred:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        return None, grad_outputs[0]


def _getters(names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names.split()}


METADATA: set[Any] = {
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_same_size,
    torch.Tensor.is_same_size,
    torch.Tensor.size,
    torch.Tensor.stride,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.is_inference,
    torch.Tensor.get_device,
    torch.Tensor.storage_offset,
    torch.Tensor.__len__,
} | _getters(
    "shape dtype device layout requires_grad is_leaf ndim itemsize nbytes is_cuda is_cpu is_meta "
    "is_sparse is_quantized is_nested is_mps is_xpu is_mkldnn is_sparse_csr grad_fn grad "
    "retains_grad output_nr"
)
"""What a deferred tensor answers itself."""

WATCHING: set[Any] = {
    torch.Tensor.register_hook,
    torch.Tensor.retain_grad,
}
"""What concerns the gradient that arrives at the tensor: from then on it is used as it is."""

ALIASES: set[Any] = {
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
} | _getters("data")
"""What gives a hold of the value's memory, so that it may change without notice."""
