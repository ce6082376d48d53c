"""Memory that has run out: what holds it, and what would fit."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.memory.count import optimizer_state_bytes, unique_bytes, weight_tensors
from velora_torch.memory.planner.budget import gib
from velora_torch.memory.planner.ranks import STRATEGIES
from velora_torch.report.environment import machine_info
from velora_torch.report.quantities import format_bytes
from velora_torch.training.data import PreparedData
from velora_torch.training.schema import Recipe
from velora_torch.training.strategies import Strategy

MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "alloc_cpu")
"""In errors that have no class of their own: the CPU's allocator and CUDA libraries."""


class OutOfMemoryError(ValueError):
    """A training step needs more memory than there is; what had been saved stays."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in MESSAGES)


def holders(
    model: nn.Module, gradients: Iterable[Tensor], optimizer: Any, saved_activations: int | None
) -> str:
    """What is allocated, by category.

    Args:
        model: what trains.
        gradients: those that there are.
        optimizer: its optimizer; None where there is none yet.
        saved_activations: bytes of a whole micro-batch, where one has been measured.
    """
    plain = getattr(optimizer, "optimizer", optimizer)
    parts = {
        "weights": unique_bytes(weight_tensors(model)),
        "gradients": unique_bytes(gradients),
        "optimizer state": 0 if plain is None else optimizer_state_bytes(plain),
    }
    text = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    if saved_activations is None:
        text += ", saved activations not measured (the first micro-batch did not fit)"
    else:
        text += f", saved activations of the first micro-batch {format_bytes(saved_activations)}"
    return f"held: {text}; {_in_use()}"


def _in_use() -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        own = torch.cuda.memory_allocated()
        return (
            f"{format_bytes(own)} of the card's {format_bytes(total)} are allocated by torch, "
            f"{format_bytes(free)} are free"
        )
    return f"the machine has {format_bytes(machine_info().memory_bytes)}"


def what_fits(recipe: Recipe, data: PreparedData, strategy: Strategy, split: bool) -> str:
    """What `velora plan` would say about a recipe in the memory that there is.

    Args:
        recipe: what was trained.
        data: prepared for it.
        strategy: how processes share the model.
        split: whether they split its layers.
    """
    from velora_torch.training.budget import plan_of

    budget = _memory()
    if budget is None:
        return "the size of this machine's memory is not known, so that nothing can be planned"
    ask = f"velora plan --model {recipe.model} --batch {recipe.train.batch_size} --budget "
    ask += gib(budget).replace(" ", "")
    if split or strategy not in STRATEGIES:
        return "a run whose processes share the model like this can't be planned for"
    planned = recipe.method in ("full", "lora", "qlora") and not recipe.train.autocast
    if recipe.task != "language-modeling" or not planned:
        return f"this recipe can't be planned for as it is; an estimate: {ask}"
    try:
        asked = recipe.model_copy(update={"memory_budget": recipe.memory_budget or budget})
        made = plan_of(asked, data, lambda line: None, strategy)
    except (ValueError, RuntimeError, OSError) as error:
        return f"what would fit could not be planned: {error}"
    return f"what would fit by simulation:\n{made}"


def _memory() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return machine_info().memory_bytes


def release() -> None:
    """Give back what a failed pass has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def explained(trainer: Any) -> Iterator[None]:
    """Say of memory that runs out outside of forward and backward passes what holds it.

    Raises:
        OutOfMemoryError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    else:
        return
    saved = trainer.record.memory.saved_activations
    held = holders(trainer.model, trainer.held_gradients(), trainer.optimizer, saved)
    raise OutOfMemoryError(
        f"after step {trainer.state.global_step}: out of memory in the optimizer's step or an "
        f"evaluation ({reason})\n{held}\nThe last checkpoint is from before it: lower the memory "
        f"(another train.optimizer, evaluate.batch_size) and go on with --resume"
    )
