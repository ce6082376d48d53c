"""The peak of a training step, by category, on fake and on real tensors alike.

A dispatch mode sees every tensor that an operator makes. Each storage is counted once, from its
birth until nothing holds it (a weak reference tells), in blocks of 512 bytes as the CUDA allocator
rounds. What a storage *is* often shows only later: what survives the forward pass was saved for
the backward pass, what ends in ``parameter.grad`` is a gradient. A block that changes its category
changes it in every peak at which it was alive.

Peaks are kept for each segment of a step (see :mod:`velora_torch.memory.simulator.steps`), because
the peak of a segment is an affine function of a model's depth, which the peak of the step is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

BLOCK = 512
"""Bytes in which the CUDA allocator hands out memory."""


_DEVICE = torch.ops.prim.device.default
"""Most of the calls with fake tensors: C++ asks Python for the device of each, over and over."""

AFTER_UPDATE = "after the update"
"""Place of what follows an optimizer's own step, such as folding."""


class Category(IntEnum):
    """What a storage is for."""

    WEIGHTS = 0
    """Parameters and buffers."""
    GRADIENTS = 1
    OPTIMIZER_STATE = 2
    SAVED_ACTIVATIONS = 3
    """What autograd keeps from a forward pass (or its recomputation), and the batch."""
    LOGITS = 4
    """Logits, their gradient, and what the loss keeps of their width."""
    TEMPORARY = 5


ByCategory = dict[str, int]
"""Bytes by the lower-case name of a category."""


def named(bytes_by_category: Iterable[int]) -> ByCategory:
    """Numbers in the order of the categories, by name."""
    return {c.name.lower(): n for c, n in zip(Category, bytes_by_category, strict=True)}


@dataclass
class _Block:
    size: int
    category: Category
    birth: int
    weight_like: bool = False
    """A copy of weights, such as autocast and dequantisation make."""


@dataclass
class Peak:
    """The largest moment of a segment."""

    total: int = -1
    time: int = -1
    parts: list[int] = field(default_factory=lambda: [0] * len(Category))

    def by_category(self) -> ByCategory:
        """Bytes by category; they sum to ``total``."""
        return named(self.parts)


@dataclass
class Flops:
    """Floating-point operations of a step's matrix products and attention, as torch counts them.

    Attention counts as a whole, causal or not; on fake and on CPU tensors as on a GPU.
    """

    forward: int = 0
    recompute: int = 0
    """Forward operators that ran again in the backward pass."""
    input_gradients: int = 0
    """dX, and the backward of attention."""
    weight_gradients: int = 0
    """dW: matrix products of the backward pass in which no weight takes part."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.recompute + self.input_gradients + self.weight_gradients


class Tracker(TorchDispatchMode):
    """Counts the memory that training steps hold. Use :meth:`watch` first, then ``with tracker:``.

    Args:
        vocab: width of the logits; tensors of that last dimension count as logits.
        block: bytes to which storages are rounded up.
    """

    def __init__(self, vocab: int | None = None, block: int = BLOCK) -> None:
        super().__init__()
        self._vocab, self._block = vocab, block
        self._live: dict[int, tuple[weakref.ref[Any], _Block]] = {}
        self._clock = 0
        self._phase = "outside"
        self._place = ""
        self._now = [0] * len(Category)
        self._total = 0
        self._recomputed: list[int] = []
        self._recomputing = False
        self._depth = 0
        self.peaks: dict[str, Peak] = {}
        self.flops = Flops()
        self.saved = 0
        """Saved activations and logits alive at the end of the last forward pass."""

    # ------------------------------------------------------------------ what is known beforehand

    @contextmanager
    def watch(self, model: nn.Module, batch: Iterable[Tensor] = ()) -> Iterator[Tracker]:
        """Count the model's weights and the batch, and recognise its gradients, inside."""
        self.note_weights(model)
        for tensor in batch:
            self._label(tensor, Category.SAVED_ACTIVATIONS)
        handles = [
            p.register_post_accumulate_grad_hook(self._note_gradient)
            for p in model.parameters()
            if p.requires_grad
        ]
        handles.append(nn.modules.module.register_module_forward_pre_hook(self._enter_module))
        handles.append(
            nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True)
        )
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def note_weights(self, model: nn.Module, more: Iterable[Tensor] = ()) -> None:
        """Label parameters, buffers and ``more``; again after a step that replaces buffers."""
        for tensor in [*model.parameters(), *model.buffers(), *more]:
            self._label(tensor.detach(), Category.WEIGHTS)

    def note_states(self, optimizer: Optimizer) -> None:
        """Label an optimizer's state."""
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self._label(value, Category.OPTIMIZER_STATE)

    # ------------------------------------------------------------------ phases of a step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside: ``forward``, ``backward`` or ``optimizer``."""
        start, before = self._clock, (self._phase, self._place)
        self._phase, self._place = name, ""
        try:
            yield
        finally:
            self._end_recompute()
            if name == "forward":
                self._settle_forward(start)
            self._phase, self._place = before

    def at(self, place: str) -> None:
        """Name the part of the model that works now; a place of its own in ``peaks``."""
        self._place = place

    @property
    def phase_name(self) -> str:
        """The phase that is running."""
        return self._phase

    def _settle_forward(self, start: int) -> None:
        saved = 0
        for _, block in list(self._live.values()):
            if block.birth >= start and block.category == Category.TEMPORARY:
                self._relabel(block, Category.SAVED_ACTIVATIONS)
            if block.category in (Category.SAVED_ACTIVATIONS, Category.LOGITS):
                saved += block.size
        self.saved = saved

    def totals(self) -> ByCategory:
        """What is held now."""
        return named(self._now)

    # ------------------------------------------------------------------ births and deaths

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count what it made."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._phase == "optimizer" and self._place != AFTER_UPDATE:
            self._place = _dtype(args) or self._place
        # The gradient of the loss is made before autograd's engine runs.
        backward = self._phase == "backward" and torch._C._current_graph_task_id() >= 0
        again = backward and (self._depth > 0 or torch.is_grad_enabled())
        if self._recomputing and not again:
            self._end_recompute()
        self._recomputing = again
        for tensor in _tensors(out):
            self._see(tensor, args)
        packet: Any = getattr(func, "_overloadpacket", None)
        packet = _AS_ON_CUDA.get(packet, packet)
        if packet in flop_registry:
            self._count_flops(flop_registry[packet](*args, **kwargs, out_val=out), packet, args)
        return out

    def _see(self, tensor: Tensor, args: tuple[Any, ...]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or tensor.is_meta:  # a layout, which has no memory
            return
        size = storage.nbytes()
        category = Category.TEMPORARY
        if self._vocab and tensor.dim() > 1 and tensor.shape[-1] == self._vocab:
            category = Category.LOGITS
        block = self._add(storage, key, size, category)
        block.weight_like = self._all_weights(args)
        if self._recomputing:
            self._recomputed.append(key)

    def _add(self, storage: Any, key: int, nbytes: int, category: Category) -> _Block:
        size = -(-nbytes // self._block) * self._block
        block = _Block(size, category, self._clock)
        self._clock += 1

        this = weakref.ref(self)

        def died(_: Any) -> None:
            tracker = this()
            if tracker is not None and tracker._live.pop(key, None) is not None:
                tracker._now[block.category] -= size
                tracker._total -= size

        self._live[key] = (weakref.ref(storage, died), block)
        self._now[category] += size
        self._total += size
        self._note_peak()
        return block

    def _note_peak(self) -> None:
        segment = f"{self._phase}:{self._place}" if self._place else self._phase
        peak = self.peaks.get(segment)
        if peak is None:
            peak = self.peaks[segment] = Peak()
        if self._total > peak.total:
            peak.total, peak.time, peak.parts = self._total, self._clock, self._now.copy()

    # ------------------------------------------------------------------ categories

    def _label(self, tensor: Tensor, category: Category) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            self._relabel(self._live[key][1], category)
        else:
            self._add(storage, key, storage.nbytes(), category)

    def _relabel(self, block: _Block, category: Category) -> None:
        former = block.category
        if former == category:
            return
        block.category = category
        self._now[former] -= block.size
        self._now[category] += block.size
        for peak in self.peaks.values():
            if peak.time > block.birth:  # alive now, so alive then
                peak.parts[former] -= block.size
                peak.parts[category] += block.size

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._label(parameter.grad, Category.GRADIENTS)

    def _end_recompute(self) -> None:
        """What survives a recomputation is held for the backward pass of its layer."""
        for key in self._recomputed:
            entry = self._live.get(key)
            if entry is not None and entry[1].category == Category.TEMPORARY:
                self._relabel(entry[1], Category.SAVED_ACTIVATIONS)
        self._recomputed.clear()
        self._recomputing = False

    def _all_weights(self, args: tuple[Any, ...]) -> bool:
        seen = False
        for tensor in _tensors(args):
            entry = self._live.get(tensor.untyped_storage()._cdata)
            if entry is None or not (entry[1].weight_like or entry[1].category == Category.WEIGHTS):
                return False
            seen = True
        return seen

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._depth += self._phase == "backward"

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= self._phase == "backward"

    # ------------------------------------------------------------------ operations

    def _count_flops(self, count: int, packet: Any, args: tuple[Any, ...]) -> None:
        if self._phase == "forward":
            self.flops.forward += count
        elif self._phase == "backward":
            if self._recomputing:
                self.flops.recompute += count
            elif packet in _PRODUCTS and not self._has_weight(args):
                self.flops.weight_gradients += count
            else:
                self.flops.input_gradients += count

    def _has_weight(self, args: tuple[Any, ...]) -> bool:
        return any(self._all_weights((tensor,)) for tensor in _tensors(args))


def _dtype(args: tuple[Any, ...]) -> str:
    """Optimizers update the parameters of one type after those of another."""
    first = next(_tensors(args), None)
    return "" if first is None else str(first.dtype)


_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm, _ATEN.addmm)
_AS_ON_CUDA = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        _ATEN._scaled_dot_product_flash_attention_backward
    ),
}
"""Attention on the CPU, which torch does not count, and what it counts on a GPU."""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
