"""Running a forward again in the backward pass, under the conditions of the first time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Autocast:
    """The state of autocast on one type of device."""

    device: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def of(cls, tensor: Tensor) -> Autocast:
        """The state now, for the device of a tensor."""
        device = tensor.device.type
        if not torch.amp.is_autocast_available(device):
            return cls(device, False, None)
        enabled = torch.is_autocast_enabled(device)
        return cls(device, enabled, torch.get_autocast_dtype(device))

    def again(self) -> AbstractContextManager[Any]:
        """The state as a context."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device, self.dtype, self.enabled)

    def matmul_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which a matrix product of tensors of a type is computed."""
        if self.enabled and self.dtype is not None and dtype != torch.float64:
            return self.dtype
        return dtype


def can_replay(*tensors: Tensor) -> bool:
    """Whether autograd is going to record an operator on these tensors, and an ordinary one.

    Under ``torch.compile`` and ``torch.func``, and on other subclasses of tensors, the original
    forward runs.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return all(map(is_ordinary, tensors)) and any(t.requires_grad for t in tensors)


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own, or a fake one."""
    return type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)


def replay(
    compute: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    grad_output: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``compute(*tensors)`` by running it again; ``None`` where none is needed.

    Differentiable where autograd is on, as it is with ``create_graph=True``.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = leaves(tensors, needs, keep_graph=create_graph)
        output = compute(*inputs)
        return gradients(output, inputs, needs, grad_output, create_graph)


def leaves(tensors: Sequence[Tensor], needs: Sequence[bool], keep_graph: bool) -> list[Tensor]:
    """Tensors to differentiate with respect to, each a new one although two may be the same."""
    if keep_graph:
        return [t.view_as(t) for t in tensors]
    return [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]


def gradients(
    output: Tensor,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grad_output: Tensor,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients in those inputs that need one."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    if not wanted:
        return (None,) * len(inputs)
    found = iter(
        torch.autograd.grad(
            output, wanted, grad_output, create_graph=create_graph, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needs)


def run_with(
    module: nn.Module, kind: type[nn.Module], parameters: dict[str, Any], x: Tensor
) -> Any:
    """The forward of class ``kind`` on a module's attributes, but with other parameters."""
    stand_in = kind.__new__(kind)
    stand_in.__dict__ = {**module.__dict__, "_parameters": parameters}
    return kind.forward(stand_in, x)
