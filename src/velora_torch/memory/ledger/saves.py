"""Which operator of which layer saves which tensor for the backward pass.

A pack hook of autograd is called while the node that saves is being made, or has just been made,
so the node is the newest one: its sequence number is one less than the next. After the forward
pass the graph tells the name of the node with that number.
"""

from __future__ import annotations

import bisect
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from velora_torch.subtoken.factored import FactoredLinear, Keep

OUTSIDE = "(outside)"
"""The name of what runs outside of the model's forward, such as a loss function."""
UNKNOWN = "(unknown)"
"""The name of an operator whose node the outputs do not lead to."""


class Holder(NamedTuple):
    """One who saves a storage."""

    layer: str
    """Dotted name of the innermost layer that was running; ``""`` is the model itself."""
    kind: str
    """Class of that layer; of the plain layer where it is compressed."""
    operator: str
    """Name of the autograd node, such as ``mul`` or ``FactoredLinear``."""

    def name_beside(self, layer: str) -> str:
        """Its name without what it has in common with a layer; its class, if it contains that."""
        if not self.layer or layer.startswith(f"{self.layer}."):
            return self.kind
        return beside(self.layer, layer)


@dataclass(frozen=True)
class Saved:
    """One storage that is kept for the backward pass."""

    bytes: int
    """Of the whole storage."""
    shape: tuple[int, ...]
    """Of the tensor by which it was saved first."""
    dtype: str
    holders: tuple[Holder, ...]
    """All who save it, the first one first."""

    @property
    def layer(self) -> str:
        """The layer that saved it first."""
        return self.holders[0].layer

    @property
    def kind(self) -> str:
        """The class of that layer."""
        return self.holders[0].kind

    @property
    def operator(self) -> str:
        """The operator that saved it first."""
        return self.holders[0].operator

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "bytes": self.bytes,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "layer": self.layer,
            "kind": self.kind,
            "operator": self.operator,
            "holders": [{"layer": h.layer, "operator": h.operator} for h in self.holders],
        }


def beside(name: str, layer: str) -> str:
    """A dotted name without what it has in common with another one's beginning."""
    ours, theirs = name.split("."), layer.split(".")
    while len(ours) > 1 and len(theirs) > 1 and ours[0] == theirs[0]:
        ours, theirs = ours[1:], theirs[1:]
    return ".".join(ours)


def any_block(name: str) -> str:
    """``layers.11.mlp`` as ``layers.*.mlp``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def record(model: nn.Module, run: Callable[[], Any]) -> list[Saved]:
    """What autograd holds after a forward pass, parameters and buffers of the model excluded.

    Works on real and on fake tensors. Under gradient checkpointing it sees what checkpointing
    itself keeps.

    Args:
        model: whose layers are named.
        run: runs the forward pass and returns all that is to be kept of it: any nest of tensors,
            the loss among them.
    """
    recorder = _Recorder(model)
    before = [*model.parameters(), *model.buffers()]
    with recorder.active():
        output = run()
    # A forward may replace buffers, as a draw of vectors does; both are alive, so keys are unique.
    own = {storage_key(t) for t in [*before, *model.parameters(), *model.buffers()]}
    return recorder.saved(_operators(_tensors(output)), own)


def storage_key(tensor: Tensor) -> int:
    """What identifies a storage while it lives; fake ones have no address."""
    return tensor.untyped_storage()._cdata


class _Packed:
    """What autograd keeps in place of a tensor; gone as soon as autograd lets go of it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Save(NamedTuple):
    alias: Tensor  # keeps the storage alive, so that its key is not used again
    packed: weakref.ref[_Packed]
    layer: str
    kind: str
    node: int | str  # sequence number, or the name of what has no node that can be found


class _Recorder:
    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[tuple[str, str]] = [(OUTSIDE, OUTSIDE)]
        self._saves: list[_Save] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._names:
            kind = getattr(module, "plain_class", type(module))  # where a class is mixed in
            self._running.append((self._names[module], kind.__name__))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._names:
            self._running.pop()

    def _pack(self, tensor: Tensor) -> _Packed:
        alias = tensor.detach()  # the tensor itself would make a cycle with its graph
        packed = _Packed(alias)
        node: int | str = torch._C._autograd._get_sequence_nr() - 1
        if sys._getframe(1).f_globals.get("__name__") == "torch.utils.checkpoint":
            node = "checkpoint"  # keeps a region's inputs beside the graph
        self._saves.append(_Save(alias, weakref.ref(packed), *self._running[-1], node))
        return packed

    def saved(self, operators: dict[int, str], own: set[int]) -> list[Saved]:
        """What is still held, each storage once; storages in ``own`` are left out."""
        numbers = sorted(operators)
        found: dict[int, tuple[Tensor, dict[Holder, None]]] = {}
        for save in self._saves:
            key = storage_key(save.alias)
            if key in own or save.packed() is None or not save.alias.untyped_storage().nbytes():
                continue
            holder = Holder(save.layer, save.kind, _operator(save.node, operators, numbers))
            found.setdefault(key, (save.alias, {}))[1].setdefault(holder)
        return [
            Saved(
                alias.untyped_storage().nbytes(),
                tuple(alias.shape),
                str(alias.dtype).removeprefix("torch."),
                tuple(holders),
            )
            for alias, holders in found.values()
        ]


def _operator(node: int | str, operators: dict[int, str], numbers: list[int]) -> str:
    if isinstance(node, str):
        return node
    if node in operators:
        return operators[node]
    # An autograd function that computed with gradients inside of its forward was numbered before
    # what it computed, and saves after that.
    earlier = bisect.bisect_right(numbers, node) - 1
    return operators[numbers[earlier]] if earlier >= 0 else UNKNOWN


def _operators(outputs: Iterable[Tensor]) -> dict[int, str]:
    """Name of each node of the graph behind the outputs, by its sequence number."""
    found: dict[int, str] = {}
    nodes: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        found[node._sequence_nr()] = _name(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def _name(node: Any) -> str:
    """``MulBackward0`` as ``mul``; names of several words and Python's own stay as they are."""
    if isinstance(node, torch._C._FunctionBase):  # may have an attribute `name` of its own
        if type(node) is Keep._backward_cls:
            return FactoredLinear.__name__  # keeps in its place, where saving is watched
        return type(node).__name__.removesuffix("Backward").lstrip("_")
    name = re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])
    return name.lower() if name[1:].islower() else name


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
