"""Where a loss or a gradient became NaN or infinite: the layer, found by taking the step again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from velora_torch import ranks
from velora_torch.sharding import local

ADVICE = (
    "Lower train.learning_rate, or leave such steps out with train.on_nonfinite: skip, and go on "
    "with --resume"
)


class NonFiniteError(ValueError):
    """A loss or gradient is not finite, or weights are not; nothing of it was saved."""


def finite(tensors: Iterator[Tensor]) -> Tensor | None:
    """Whether all entries of all tensors are finite (0-d boolean); None where there are none."""
    flags = [torch.isfinite(local(t.detach())).all() for t in tensors if t.is_floating_point()]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all() if flags else None


def bad_weights(model: nn.Module) -> list[str]:
    """Names of parameters that hold NaN or infinite numbers, on any rank."""
    return ranks.union(
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and not bool(torch.isfinite(local(p.detach())).all())
    )


def check_weights(model: nn.Module, when: str) -> None:
    """Raise `NonFiniteError` where parameters that are to be saved hold NaN or infinite numbers."""
    weights = bad_weights(model)
    if weights:
        raise NonFiniteError(
            f"{when}: {len(weights)} weights are not finite, such as {weights[0]}; they are not "
            f"saved, and checkpoints before stay, if train.save_every has any written. {ADVICE}"
        )


def first_nonfinite(model: nn.Module, again: Callable[[], object]) -> str:
    """The first thing in a step that is not finite, in words.

    Args:
        model: what trains.
        again: takes the step's forward and backward passes once more.
    """
    watch = _Watch(model)
    try:
        model.zero_grad(set_to_none=True)
        again()
    finally:
        watch.stop()
        model.zero_grad(set_to_none=True)
    return watch.found or "taken again, the step is finite: the cause is not in its numbers alone"


class _Watch:
    """Hooks on every module and parameter; `found` is the first that was not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.found: str | None = None
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            hook = self._forward_hook(name or type(module).__name__, type(module).__name__)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hook_of = self._gradient_hook(f"the gradient of the weight {name}")
                self._handles.append(parameter.register_hook(hook_of))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward_hook(self, name: str, kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
            if self.found is None and not _is_finite(tensors):
                inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                of = "a finite input" if _is_finite(inputs) else "an input that was not finite"
                self.found = f"the output of {name} ({kind}) became non-finite, from {of}"
            for tensor in tensors:
                if tensor.requires_grad and torch.is_grad_enabled():
                    tensor.register_hook(
                        self._gradient_hook(f"the gradient at the output of {name} ({kind})")
                    )

        return hook

    def _gradient_hook(self, what: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self.found is None and not _is_finite([gradient]):
                self.found = f"{what} became non-finite, with a finite forward pass"

        return hook


def _is_finite(tensors: list[Tensor]) -> bool:
    flag = finite(iter(tensors))
    return flag is None or bool(flag)
