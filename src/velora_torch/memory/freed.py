"""Warns where compressing a layer frees nothing, since something else keeps the same input.

For a transformers model that is known before the first batch, from a ledger of a small fake copy.
Elsewhere two hooks on the model watch its first training forward, and go away after it.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from velora_torch.blocks import repeated_blocks
from velora_torch.layers import CompressedLayer, linear_shape, uncompressible
from velora_torch.memory.ledger.saves import any_block, beside

ModelT = TypeVar("ModelT", bound=nn.Module)
Useless = dict[str, tuple[str, ...]]
"""Names of layers that free nothing, and of those who keep their input."""


class TargetWarning(UserWarning):
    """A layer is compressed, and that frees nothing."""


_BLOCKS = 2
"""Repeated blocks that are looked at: what one of them shares, all share."""
_SOMETHING = "code outside of the layers"


def foresee(model: nn.Module, targets: Sequence[str]) -> bool:
    """Warn of targets that will free nothing, before they are compressed.

    Returns:
        Whether that is known now; if not, :func:`arm` the model when it is compressed.
    """
    if any(isinstance(p, FakeTensor) for p in model.parameters()):
        return True  # a simulation, which tells in bytes
    if not (_is_transformers(model) and _sharing_is_likely(model, targets)):
        return False
    found = _from_ledger(model, targets)
    if found is not None:
        _warn(found, targets, stacklevel=4)
    return found is not None


def arm(model: nn.Module) -> None:
    """Watch the first training forward of a compressed model, and warn after it."""
    if isinstance(model, CompressedLayer):
        return
    watch = _Watch()
    model.register_forward_pre_hook(watch.enter, with_kwargs=True)
    model.register_forward_hook(watch.leave, with_kwargs=True, always_call=True)


def disarm(model: ModelT) -> ModelT:
    """Remove the hooks that :func:`arm` has left on a model or parts of it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)
    return model


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Watch)


# -------------------------------------------------------------------------- before the first batch


def _is_transformers(model: nn.Module) -> bool:
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(model, loaded.PreTrainedModel)


def _sharing_is_likely(model: nn.Module, targets: Sequence[str]) -> bool:
    """Whether a layer that stays exact has a target of the same width beside it."""
    inputs: dict[tuple[str, int], set[bool]] = {}
    for name, module in model.named_modules():
        if uncompressible(module) is None and module.weight.requires_grad:
            place = (name.rpartition(".")[0], linear_shape(module)[1])
            inputs.setdefault(place, set()).add(name in targets)
    return any(len(kinds) == 2 for kinds in inputs.values())


def _from_ledger(model: nn.Module, targets: Sequence[str]) -> Useless | None:
    """What a ledger of the model's first blocks says; ``None`` if its dummy batch won't run."""
    from velora_torch.memory.fake import skeleton
    from velora_torch.memory.ledger.ledger import useless_targets
    from velora_torch.memory.ledger.rehearsal import FakeRehearsal

    small = disarm(skeleton(model))
    for _, blocks in repeated_blocks(small):
        del blocks[_BLOCKS:]
    there = {name for name, _ in small.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model, about a batch that is not the user's
        try:
            rows = FakeRehearsal(small, dict(model.dummy_inputs), None).saves()  # type: ignore[arg-type]
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return None  # it needs more than a dummy batch, or all of its blocks
    useless = useless_targets(rows, [name for name in targets if name in there])
    return {
        name: tuple(dict.fromkeys(holder.name_beside(name) for holder in others))
        for name, others in useless.items()
        if others
    }


# ------------------------------------------------------------------------ in the first forward


class _Watch:
    """The two hooks on a model; to a copy of the model goes a copy that has seen nothing."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}

    def enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._seen is not None or not _trains(model):
            return
        self._seen = _Seen(model, _storages((args, kwargs)))

    def leave(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._seen is None:
            return
        seen, self._seen = self._seen, None
        seen.close()
        if output is None:  # the forward has failed
            return
        disarm(model)
        _warn(seen.useless(_storages(output)), [name for name, _ in seen.compressed.values()])


def _trains(model: nn.Module) -> bool:
    functional = torch._C._are_functorch_transforms_active()
    return model.training and torch.is_grad_enabled() and not functional


class _Place(NamedTuple):
    name: str
    kind: str
    keeps: bool
    """Whether it is sure to keep its input: it trains a weight."""


class _Input(NamedTuple):
    storage: weakref.ref[Any]
    key: int
    has_graph: bool


class _Seen:
    """Which layers were given which storages in one forward. Holds none of them alive."""

    def __init__(self, model: nn.Module, outside: set[int]) -> None:
        self.compressed: dict[nn.Module, tuple[str, list[_Input]]] = {}
        self._names = {m: name for name, m in model.named_modules()}
        self._outside = outside  # the caller's own
        self._users: dict[int, list[_Place]] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        for module, name in self._names.items():
            if isinstance(module, CompressedLayer):
                self.compressed[module] = (name, [])
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self.compressed:
            for tensor in _plain_tensors(args):
                key = self._note(tensor)
                given = _Input(self._alive[key], key, tensor.requires_grad)
                self.compressed[module][1].append(given)
        elif self._is_leaf(module):
            self._note_user(module, args)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._is_leaf(module) and next(module.parameters(recurse=False), None) is None:
            self._note_user(module, output)  # an activation may keep what it returns

    def _is_leaf(self, module: nn.Module) -> bool:
        return module in self._names and next(module.children(), None) is None

    def _note_user(self, module: nn.Module, values: Any) -> None:
        parameters = list(module.parameters(recurse=False))
        trains = any(p.requires_grad for p in parameters)
        if parameters and not trains:
            return  # what is frozen keeps no input
        place = _Place(self._names[module], type(module).__name__, trains)
        for tensor in _plain_tensors(values):
            users = self._users[self._note(tensor)]
            if place not in users:
                users.append(place)

    def _note(self, tensor: Tensor) -> int:
        """The key of a storage, whose users are forgotten when it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._users[key] = []

            def freed(_: Any) -> None:
                self._alive.pop(key, None)
                self._users.pop(key, None)

            self._alive[key] = weakref.ref(storage, freed)
        return key

    def useless(self, outside: set[int]) -> Useless:
        """Compressed layers all of whose inputs are still alive, for which nobody outside cares."""
        outside = outside | self._outside
        found: Useless = {}
        for name, inputs in self.compressed.values():
            keepers = [self._keepers(given, outside) for given in inputs]
            if keepers and all(keepers):
                found[name] = tuple(dict.fromkeys(k for group in keepers for k in group))
        return found

    def _keepers(self, given: _Input, outside: set[int]) -> list[str]:
        if given.storage() is None or given.key in outside:
            return []
        users = self._users.get(given.key, [])
        sure = [place.name for place in users if place.keeps]
        if sure:
            return sure
        if not given.has_graph:  # data, which anyone may hold
            return []
        return [f"{place.name} ({place.kind})" for place in users] or [_SOMETHING]


def _plain_tensors(values: Any) -> Iterable[Tensor]:
    """Tensors that have a storage of their own; what subclasses hold is their secret."""
    for leaf in pytree.tree_leaves(values):
        if type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided:
            yield leaf


def _storages(values: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _plain_tensors(values)}


# -------------------------------------------------------------------------------- the message


def _warn(
    useless: Mapping[str, Sequence[str]], targets: Sequence[str], stacklevel: int = 2
) -> None:
    """One warning for all layers; those that differ in their block alone are counted."""
    if not useless:
        return
    counts = Counter(any_block(name) for name in targets)
    ends = Counter(_end(kind) for kind in counts)
    lines = {}
    for name, keepers in useless.items():
        kind = any_block(name)
        short = _end(kind) if ends[_end(kind)] == 1 else kind
        layer = name if counts[kind] == 1 else f"{short} ({counts[kind]} layers)"
        others = dict.fromkeys(any_block(beside(keeper, name)) for keeper in keepers)
        lines[kind] = f"{layer}: kept by {', '.join(others)}"
    warnings.warn(
        "VeLoRA: compressing these layers frees no activations, since something else keeps the "
        "same input:\n  "
        + "\n  ".join(lines.values())
        + "\nCompress what keeps it too, or leave these layers out of targets. What is freed in "
        "bytes: velora_torch.memory.explain(plain_model, batch).what_if(targets)",
        TargetWarning,
        stacklevel=stacklevel,
    )


def _end(name: str) -> str:
    return name.rpartition(".")[2]
