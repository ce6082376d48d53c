"""Training steps under the tracker: the same code for fake and for real tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from velora_torch.blocks import BlockList
from velora_torch.memory.simulator.four_bit import is_bitsandbytes
from velora_torch.memory.simulator.tracker import AFTER_UPDATE, ByCategory, Flops, Peak, Tracker

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Trace:
    """What some training steps held."""

    peaks: dict[str, Peak]
    """The largest moment of each segment, such as ``backward:layers/last``.

    The optimizer's step has one for each type of numbers and one for what follows the update, since
    these differ in how they grow with a model's depth.
    """
    weights: int
    saved: int
    """What is alive at the end of a forward pass besides weights, gradients and states: saved
    activations and logits, the batch, and the loss itself (one block)."""
    gradients: int
    optimizer_state: int
    flops: Flops
    """Of one step."""

    def segments(self) -> dict[str, int]:
        """Largest bytes of each segment, with the optimizer's step as one."""
        return {name: peak.total for name, peak in self._largest().items()}

    def moments(self) -> dict[str, ByCategory]:
        """The same by category."""
        return {name: peak.by_category() for name, peak in self._largest().items()}

    def _largest(self) -> dict[str, Peak]:
        largest: dict[str, Peak] = {}
        for name, peak in self.peaks.items():
            name = "optimizer" if name.startswith("optimizer") else name
            if name not in largest or peak.total > largest[name].total:
                largest[name] = peak
        return largest


def track(
    model: nn.Module,
    optimizer: Optimizer | None,
    loss: Loss,
    batch: Sequence[Tensor],
    *,
    blocks: dict[str, BlockList] | None = None,
    steps: int = 2,
    accumulation: int = 1,
    vocab: int | None = None,
) -> Trace:
    """Take training steps and record what they hold. The steps are really taken.

    Args:
        model: in train mode; its gradients are cleared.
        optimizer: over the model's trainable parameters; ``None`` leaves its step out.
        loss: computes the loss of one micro-batch (a 0-d tensor).
        batch: the tensors of the batch, which are counted too.
        blocks: lists of repeated blocks, whose first and last block get segments of their own.
        steps: optimizer steps; states exist from the second on.
        accumulation: micro-batches of a step.
        vocab: width of the logits.
    """
    model.zero_grad(set_to_none=True)
    tracker = Tracker(vocab)
    gradients = 0
    with tracker.watch(model, batch), _places(tracker, blocks or {}), tracker:
        tracker.note_weights(model, _scales(model))
        if optimizer is not None:
            tracker.note_states(optimizer)
        tracker.peaks.clear()
        for _ in range(steps):
            tracker.flops = Flops()
            for _ in range(accumulation):
                with tracker.phase("forward"):
                    value = loss()
                with tracker.phase("backward"):
                    value.backward()
                del value
            gradients = tracker.totals()["gradients"]
            if optimizer is not None:
                with tracker.phase("optimizer"), _after_update(optimizer, tracker):
                    optimizer.step()
                tracker.note_states(optimizer)
            tracker.note_weights(model)
            model.zero_grad(set_to_none=True)
    held = tracker.totals()
    peaks = {name: peak for name, peak in tracker.peaks.items() if not name.startswith("outside")}
    return Trace(
        peaks,
        held["weights"],
        tracker.saved,
        gradients,
        held["optimizer_state"],
        tracker.flops,
    )


def _scales(model: nn.Module) -> Iterator[Tensor]:
    """What 4-bit layers of bitsandbytes hold besides parameters and buffers."""
    module: Any
    for module in model.modules():
        if is_bitsandbytes(module):
            state = module.weight.quant_state
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)


@contextmanager
def _after_update(optimizer: Optimizer, tracker: Tracker) -> Iterator[None]:
    """Tell the tracker when the update is done; an optimizer's own hooks run before global ones."""
    handle = optimizer.register_step_post_hook(lambda *_: tracker.at(AFTER_UPDATE))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _places(tracker: Tracker, blocks: dict[str, BlockList]) -> Iterator[None]:
    """Tell the tracker which part of the model works, forward and backward."""
    handles = []
    for name, blocklist in blocks.items():
        last = len(blocklist) - 1
        for index, block in enumerate(blocklist):
            where = "first" if index == 0 else "last" if index == last else "middle"
            hooks = _BlockHooks(tracker, f"{name}/{where}", index == 0, index == last)
            handles.append(block.register_forward_pre_hook(hooks.before, with_kwargs=True))
            handles.append(block.register_forward_hook(hooks.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BlockHooks:
    def __init__(self, tracker: Tracker, place: str, is_first: bool, is_last: bool) -> None:
        self._tracker, self._place = tracker, place
        self._stem = f"{place.rpartition('/')[0]}/before" if is_first else None
        self._tail = f"{place.rpartition('/')[0]}/after" if is_last else None

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._tracker.phase_name != "forward":
            return
        self._tracker.at(self._place)
        if self._stem:  # behind the first block, the backward pass goes on to the embeddings
            self._when_reached((args, kwargs), self._stem)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._tracker.phase_name != "forward":
            return
        self._when_reached(output, self._place)
        if self._tail:
            self._tracker.at(self._tail)

    def _when_reached(self, values: Any, place: str) -> None:
        for tensor in pytree.tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
                tensor.register_hook(lambda _: self._tracker.at(place))
                return
