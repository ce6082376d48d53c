"""Recompute norms, activations and logits in a whole model, and undo it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from velora_torch.recomputation.blocks import checkpointed, undo_checkpoints
from velora_torch.recomputation.loss import DeferringHead, why_not_chunked
from velora_torch.recomputation.modules import Deferring, Recomputed
from velora_torch.recomputation.recognise import inspect, is_candidate
from velora_torch.swap import Swapped, swap, swap_back

ModelT = TypeVar("ModelT", bound=nn.Module)


def recompute(
    model: ModelT, *, norms: bool = True, activations: bool = True, loss: bool = True
) -> ModelT:
    """Keep less for the backward pass, in place and exactly, by computing cheap things twice.

    Norms keep their input alone; a gated or plain activation keeps its input alone, its result
    and the product with the gate being computed again; the loss of a language model is computed
    in chunks of rows, so that its logits never exist as a whole. Module names, ``state_dict`` keys
    and evaluation stay what they were. Applying it twice is harmless.

    Modules are recognised by what they do. An activation that is a function inside a forward
    (``F.silu(x)``) cannot be seen, and one that is compiled runs as it was. See
    :func:`recomputed` and :func:`left_alone`.

    Args:
        model: any module.
        norms: recompute norms.
        activations: recompute activations.
        loss: compute the loss of transformers models with an output head in chunks. Their
            ``logits`` are computed when something else asks for them.

    Returns:
        The same model.
    """
    for _, module in _candidates(model):
        kind = inspect(module).kind
        if norms and kind == "norm":
            swap(module, Recomputed)
        elif activations and kind == "activation":
            swap(module, Deferring)
    if loss:
        for _, head in _heads(model):
            if why_not_chunked(head) is None:
                swap(head, DeferringHead)
    return model


def undo_recompute(model: ModelT) -> ModelT:
    """Undo :func:`recompute` and :func:`checkpoint_blocks`."""
    undo_checkpoints(model)
    for module in model.modules():
        if isinstance(module, Swapped):
            swap_back(module)
    return model


def recomputed(model: nn.Module) -> dict[str, str]:
    """Names of what is recomputed: ``"norm"``, ``"activation"``, ``"chunked loss"``, ..."""
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            names[name] = module.kind
        elif checkpointed(module):
            names[name] = "checkpoint"
    return names


def left_alone(model: nn.Module) -> dict[str, str]:
    """Names of leaf modules that might have been norms, activations or heads, and why not."""
    reasons = {}
    for name, module in _candidates(model):
        finding = inspect(module)
        reasons[name] = finding.reason or f"{finding.kind} that recompute was not asked for"
    for name, head in _heads(model):
        if not isinstance(head, Swapped):
            reason = why_not_chunked(head)
            reasons[name] = reason or "loss that recompute was not asked for"
    return reasons


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in list(model.named_modules()):
        if not isinstance(module, Swapped) and is_candidate(module):
            yield name, module


def _heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from velora_torch.heads import output_heads  # which imports the layers, and they us

    heads = {id(head) for head in output_heads(model) if head is not None}
    return [(name, module) for name, module in model.named_modules() if id(module) in heads]
