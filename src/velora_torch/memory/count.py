"""Bytes that a training step holds, counted on real tensors: every storage once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from velora_torch.sharding import local

NO_BACKWARD = -1
"""What torch calls the running backward pass while there is none."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one training step by category."""

    weights: int
    """Parameters and buffers."""
    saved_activations: int
    """What autograd keeps from the forward pass for the backward pass, weights excluded."""
    gradients: int
    optimizer_state: int

    def to_dict(self) -> dict[str, int]:
        """Plain numbers."""
        return asdict(self)


class _Storages:
    """Unique storages; holds the tensors, so that an address is not used twice."""

    def __init__(self) -> None:
        self._seen: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> None:
        tensor = local(tensor)  # of a sharded one what this rank holds
        address = tensor.untyped_storage().data_ptr()
        if address:
            self._seen.setdefault(address, tensor)

    def nbytes(self, exclude: Iterable[Tensor] = ()) -> int:
        excluded = {local(t).untyped_storage().data_ptr() for t in exclude}
        return sum(t.untyped_storage().nbytes() for a, t in self._seen.items() if a not in excluded)


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count what autograd saves inside the block, parameters and buffers of ``model`` excluded.

    What a backward pass computes again, and saves for itself for a moment, does not count.

    Yields:
        A function that gives the bytes saved so far, every storage counted once.
    """
    storages = _Storages()

    def own() -> list[Tensor]:
        return list(weight_tensors(model))

    before = own()

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()  # returning the tensor itself would make a cycle with its graph
        if torch._C._current_graph_task_id() == NO_BACKWARD:
            storages.add(alias)
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # A forward may replace buffers, as a draw of vectors does.
        yield lambda: storages.nbytes(exclude=before + own())


def measure_step(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: Optimizer | None = None
) -> StepBytes:
    """Run one training step and count what it holds.

    Args:
        model: the model; its gradients are cleared before, and the step is really taken.
        loss: computes the loss of one batch (a 0-d tensor).
        optimizer: stepped after the backward pass, so that its state exists; ``None`` counts none.
    """
    model.zero_grad(set_to_none=True)
    with saved_bytes(model) as count:
        value = loss()
    saved = count()
    del count  # lets the backward pass free what was saved
    value.backward()
    gradients = unique_bytes(p.grad for p in model.parameters() if p.grad is not None)
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    states = optimizer_state_bytes(optimizer) if optimizer is not None else 0
    return StepBytes(unique_bytes(weight_tensors(model)), saved, gradients, states)


def weight_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and what quantised ones consist of besides: scales and codes."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from _parts(tensor, set())


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state tensors, those inside of objects (GaLore's) included."""
    return unique_bytes(
        tensor for state in optimizer.state.values() for tensor in _parts(state, set())
    )


def _parts(value: object, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that a value holds: a tensor's own parts, a container's items, attributes."""
    if id(value) in seen or isinstance(value, (nn.Module, type)) or callable(value):
        return
    seen.add(id(value))
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(value, name), seen)
        return
    if isinstance(value, Tensor):
        yield value
    inner: Iterable[object] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif type(value).__module__ != "builtins":
        inner = vars(value).values() if hasattr(value, "__dict__") else ()
    for item in list(inner):
        yield from _parts(item, seen)


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each storage once."""
    storages = _Storages()
    for tensor in tensors:
        storages.add(tensor.detach())
    return storages.nbytes()
