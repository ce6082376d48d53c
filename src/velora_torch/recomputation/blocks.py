"""Gradient checkpointing of some of a model's repeated blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from velora_torch.blocks import CHECKPOINTED, BlockList, repeated_blocks
from velora_torch.recomputation.deferred import plain
from velora_torch.swap import Swapped, swap, swap_back

SHARE = 8
"""Lists with less than one eighth of the largest one's parameters are left alone."""

MARK = "velora_before"
"""On blocks that transformers checkpoints on our behalf: its attributes as they were."""

SWITCH = (CHECKPOINTED, "_gradient_checkpointing_func")
"""What transformers' ``GradientCheckpointingLayer`` looks at."""


class Checkpointed(Swapped):
    """A block that keeps its inputs in training, and runs again in the backward pass."""

    kind = "checkpoint"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, checkpointed in training."""
        forward = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        args = tuple(plain(argument) for argument in args)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


def checkpointable(model: nn.Module) -> list[tuple[str, BlockList]]:
    """The lists of repeated blocks that hold most of a model's parameters, with their names."""
    found = repeated_blocks(model)
    sizes = [sum(p.numel() for p in blocks.parameters()) for _, blocks in found]
    least = max(sizes, default=0) / SHARE
    return [pair for pair, size in zip(found, sizes, strict=True) if size >= least]


def checkpoint_blocks(model: nn.Module, every: int = 1) -> nn.Module:
    """Checkpoint every ``every``-th of the model's repeated blocks, in place.

    Their activations are computed again in the backward pass (not reentrant), which costs one
    more forward of those blocks. Blocks of transformers use transformers' own switch.

    Args:
        model: any module.
        every: 1 checkpoints all blocks, 2 every other block, beginning with the first.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no repeated blocks, or ``every`` is not between 1 and their
            number.
    """
    lists = checkpointable(model)
    if not lists:
        raise ValueError(
            "the model has no list of two or more blocks of one class, so there is nothing to "
            "checkpoint block by block; wrap its parts in torch.utils.checkpoint instead"
        )
    most = max(len(blocks) for _, blocks in lists)
    if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= most:
        raise ValueError(f"every must be a whole number from 1 to {most} (blocks), got {every!r}")
    undo_checkpoints(model)
    for _, blocks in lists:
        for index, block in enumerate(blocks):
            chosen = index % every == 0
            if _has_switch(block):
                _switch(block, chosen)
            elif chosen:
                swap(block, Checkpointed)
    return model


def _switch(block: nn.Module, on: bool) -> None:
    attributes = vars(block)
    attributes[MARK] = {name: attributes[name] for name in SWITCH if name in attributes}
    attributes[CHECKPOINTED] = on
    attributes["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)


def undo_checkpoints(model: nn.Module) -> None:
    """Switch off what :func:`checkpoint_blocks` has switched on."""
    for module in model.modules():
        if isinstance(module, Checkpointed):
            swap_back(module)
        before = vars(module).pop(MARK, None)
        if before is not None:
            for name in SWITCH:
                vars(module).pop(name, None)
            vars(module).update(before)


def checkpointed(module: nn.Module) -> bool:
    """Whether :func:`checkpoint_blocks` has chosen a block."""
    if isinstance(module, Checkpointed):
        return True
    return MARK in vars(module) and bool(getattr(module, CHECKPOINTED, False))


def _has_switch(block: nn.Module) -> bool:
    """Whether a block is transformers' ``GradientCheckpointingLayer``."""
    return isinstance(getattr(type(block), CHECKPOINTED, None), bool)
