"""The repeated blocks of a model: the list of layers that makes it deep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from velora_torch.swap import plain_class

ModelT = TypeVar("ModelT", bound=nn.Module)
BlockList = nn.ModuleList | nn.Sequential

CHECKPOINTED = "gradient_checkpointing"
"""The switch of transformers' ``GradientCheckpointingLayer``."""


def repeated_blocks(model: nn.Module) -> list[tuple[str, BlockList]]:
    """The outermost lists of blocks of a model, with their names.

    A block is a module with children and parameters. A ``ModuleList`` counts if all its entries
    are blocks and two of them have the same class (hybrid models mix classes); a ``Sequential``,
    which may hold a whole model, only if all its blocks are alike, checkpointed or not. Lists
    inside of blocks, such as experts, do not count.
    """
    return list(_lists(model, "", set()))


def uniform_depth(model: nn.Module) -> int | None:
    """The number of blocks, where a model is one list of blocks that differ in their index alone.

    ``None`` where no such list exists, where there are several (an encoder and a decoder), where
    blocks differ in class, parameter shapes or settings (local and global attention taking turns),
    and where they share parameters. What holds for a few blocks need not hold for more then.
    """
    lists = repeated_blocks(model)
    if len(lists) != 1:
        return None
    blocks = list(lists[0][1])
    if any(not _alike(blocks[0], block, index) for index, block in enumerate(blocks)):
        return None
    parameters = [id(p) for block in blocks for p in block.parameters()]
    return len(blocks) if len(set(parameters)) == len(parameters) else None


def cut(model: ModelT, depth: int) -> ModelT:
    """Keep the first ``depth`` blocks of a model's only list of blocks, in place.

    Raises:
        ValueError: the model has no such list or several, or fewer blocks.
    """
    lists = repeated_blocks(model)
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise ValueError(
            f"only a model with one list of repeated blocks can be cut to {depth} of them; lists "
            f"of this {type(model).__name__}: {found}. Leave the depth as it is"
        )
    name, blocks = lists[0]
    if not 1 <= depth <= len(blocks):
        raise ValueError(
            f"depth must be between 1 and {len(blocks)}, the number of blocks in {name!r}, "
            f"got {depth}"
        )
    del blocks[depth:]
    return model


def _lists(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, BlockList]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if _is_block_list(module):
        yield name, module  # type: ignore[misc]
        return
    for child_name, child in module.named_children():
        yield from _lists(child, f"{name}.{child_name}" if name else child_name, seen)


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    blocks = list(module)
    if len(blocks) < 2 or not all(_is_block(block) for block in blocks):
        return False
    if isinstance(module, nn.Sequential):
        return all(
            _alike(blocks[0], block, index, checkpoints=False) for index, block in enumerate(blocks)
        )
    return len({plain_class(block) for block in blocks}) < len(blocks)


def _is_block(module: nn.Module) -> bool:
    has_children = next(module.children(), None) is not None
    return has_children and next(module.parameters(), None) is not None


def _alike(first: nn.Module, other: nn.Module, index: int, checkpoints: bool = True) -> bool:
    """Whether block ``index`` is block 0 again: modules, parameters, buffers and settings.

    With ``checkpoints=False``, one may be checkpointed and the other not.
    """
    ours, theirs = dict(first.named_modules()), dict(other.named_modules())
    if ours.keys() != theirs.keys():
        return False
    return all(_same_module(ours[name], theirs[name], index, checkpoints) for name in ours)


def _same_module(a: nn.Module, b: nn.Module, index: int, checkpoints: bool) -> bool:
    same_class = type(a) is type(b) or (not checkpoints and plain_class(a) is plain_class(b))
    if not same_class or _tensors(a) != _tensors(b):
        return False
    settings, others = _settings(a), _settings(b)
    if not checkpoints:
        settings.pop(CHECKPOINTED, None)
        others.pop(CHECKPOINTED, None)
    return settings.keys() == others.keys() and all(
        _same_setting(settings[key], others[key], index) for key in settings
    )


def _tensors(module: nn.Module) -> list[Any]:
    held = [*module._parameters.items(), *module._buffers.items()]
    return [(n, t.shape, t.dtype, t.requires_grad) for n, t in held if t is not None]


def _settings(module: nn.Module) -> dict[str, Any]:
    """Public attributes that are plain values; private ones hold caches and counters."""
    simple = (bool, int, float, str, type(None))
    held = vars(module).items()
    return {k: value for k, value in held if k[0] != "_" and isinstance(value, simple)}


def _same_setting(a: Any, b: Any, index: int) -> bool:
    if isinstance(a, str) and isinstance(b, str):  # names of parts may carry the index
        return re.sub(r"\d+", "", a) == re.sub(r"\d+", "", b)
    own_index = type(a) is int and type(b) is int and (a, b) == (0, index)
    return own_index or bool(a == b)
