"""A model chooses vectors from the tokens of all ranks: what `ranks` gathers reaches its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from velora_torch import ranks
from velora_torch.integrations import deepspeed
from velora_torch.layers import CompressedLayer
from velora_torch.layers.adapter import CompressedAdapter
from velora_torch.sharding import local

ModelT = TypeVar("ModelT", bound=nn.Module)
Part = CompressedLayer | CompressedAdapter


def choose_vectors(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Choose the vectors of a compressed model from a batch, before anything is trained.

    Nothing but the vectors changes, and those only where the next training forward would choose
    them. Needed only where that forward can't: a graph that is compiled while several processes
    train, or parts of a model that are called by themselves. Every rank must call it.

    Args:
        model: a compressed model, in training mode.
        args: what the model's forward takes.
        kwargs: the same.

    Raises:
        ValueError: the model is in evaluation mode, in which layers choose no vectors.
    """
    if not model.training:
        raise ValueError("the model is in evaluation mode; call model.train() before it")
    due = _due(model)
    if due:
        with torch.enable_grad():
            _choose(model, due, lambda: model(*args, **kwargs))


def check_ranks(model: nn.Module) -> None:
    """See that the compressed layers are the same on every rank; every rank must call it.

    Compares hashes of vectors, counters and settings: what ranks have wholly and never send.

    Raises:
        RuntimeError: names layers that differ; the same on every rank.
    """
    hashes = {}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            hashes[name] = ranks.fingerprint(local(module.velora_vectors), module.velora.counters())
        elif isinstance(module, CompressedAdapter):
            sites = sorted(module.velora_adapter.sites.items())
            hashes |= {f"{name}/{key}": ranks.fingerprint(s.vectors, s.draws) for key, s in sites}
    different = ranks.differing(hashes)
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise RuntimeError(
            f"VeLoRA: layer {different[0]!r}{more} of {len(hashes)} has other vectors or counters "
            f"on some ranks than on others, so that averaged factors mean nothing. Every rank must "
            f"compress with the same configuration and load the same state"
        )


def choose_before_forwards(model: nn.Module) -> None:
    """Let a model choose vectors before its training forwards, where several processes train."""
    model.register_forward_pre_hook(_before_forward, with_kwargs=True, prepend=True)


def forget(model: ModelT) -> ModelT:
    """Undo :func:`choose_before_forwards`."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _before_forward]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def _before_forward(model: nn.Module, args: Any, kwargs: Any) -> None:
    deepspeed.notice()
    if torch.compiler.is_compiling() or not ranks.several() or ranks.is_gathering():
        return
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return
    due = _due(model)
    if due:
        _choose(model, due, lambda: model.forward(*args, **kwargs))


def _due(model: nn.Module) -> list[Part]:
    return [m for m in model.modules() if isinstance(m, Part) and m.needs_data()]


@torch.no_grad()
def _choose(model: nn.Module, due: list[Part], call: Any) -> None:
    with _buffers_kept(model), torch.enable_grad():
        found = ranks.gather(call)
    for part in due:
        if isinstance(part, CompressedAdapter):
            part.draw_from(found)
            continue
        gathered, state = found.get(part.velora.name), part.velora
        if gathered is not None:
            part.draw(gathered.rows.to(part.velora_vectors.device))
        elif ranks.several() and state.drawn:
            state.due = False
        elif ranks.several():
            part.draw(None)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give buffers that a forward changes, such as running statistics, their content back."""
    before = [(b, b._version, b.clone()) for b in model.buffers()]
    yield
    for buffer, version, content in before:
        if buffer._version != version:
            buffer.copy_(content)
