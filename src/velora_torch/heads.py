"""Finding a model's head: the layers that turn its features into answers."""

from __future__ import annotations

from typing import Any

from torch import nn

from velora_torch.blocks import repeated_blocks
from velora_torch.integrations.peft import saved_heads

USUAL_NAMES = ("classifier", "head", "heads", "score", "qa_outputs")
"""What models call the head of a task."""


def find_head(model: nn.Module) -> list[str]:
    """Names of the modules that are a model's head, at least one.

    A task's head is what timm's ``get_classifier`` gives, or the outermost module outside of the
    repeated blocks that has a usual name (``classifier``, ``head``, ``score``, ...). Without one,
    it is the output embeddings of a language model.

    Raises:
        ValueError: there is none; says which modules there are.
    """
    found = task_head(model) or output_embeddings(model)
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no head that can be told by its name or its methods; "
            f"pass head=[...] with names of these, or head=[] if none is to be trained: "
            f"{_outside(model)}"
        )
    return found


def head_or_task_head(model: nn.Module, head: list[str] | None) -> list[str]:
    """The head that trains next to adapters: as named, or the task's if that is found.

    A language model's pre-trained output embeddings stay frozen unless named, as in PEFT.

    Raises:
        ValueError: a name is none of the model's modules, or no head is found.
    """
    if head is not None:
        return named_head(model, head)
    found = task_head(model)
    if found or output_embeddings(model):
        return found
    return find_head(model)


def named_head(model: nn.Module, head: list[str]) -> list[str]:
    """The names themselves, checked.

    Raises:
        ValueError: a name is none of the model's modules, or that module has no parameters.
    """
    if isinstance(head, str):
        raise ValueError(f"head must be a list of module names, got {head!r}: use [{head!r}]")
    modules = dict(model.named_modules())
    for name in head:
        if name not in modules or not name:
            raise ValueError(
                f"head={head!r}: the model has no module {name!r}; outside of its repeated blocks "
                f"there are: {_outside(model)}"
            )
        if next(modules[name].parameters(), None) is None:
            raise ValueError(f"head={head!r}: module {name!r} has no parameters to train")
    return list(head)


def task_head(model: nn.Module) -> list[str]:
    """Names of the modules of a task's head; empty where there is none to be seen."""
    names = {id(module): name for name, module in model.named_modules()}
    get: Any = getattr(model, "get_classifier", None)
    if get is not None:
        given = get()
        parts = given if isinstance(given, (tuple, list)) else [given]
        found = [names[id(part)] for part in parts if _has_parameters(part) and id(part) in names]
        if found:
            return found
    embeddings = set(output_embeddings(model))
    candidates = [
        name
        for name, module in _modules_outside(model).items()
        if name.rpartition(".")[2] in USUAL_NAMES
        and name not in embeddings
        and _has_parameters(module)
    ]
    depth = min((name.count(".") for name in candidates), default=0)
    return [name for name in candidates if name.count(".") == depth]


def output_embeddings(model: nn.Module) -> list[str]:
    """Names of the output embeddings of the language models in ``model``."""
    heads = {id(head) for head in output_heads(model) if head is not None}
    return [name for name, module in model.named_modules() if id(module) in heads]


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Module) and next(module.parameters(), None) is not None


def _modules_outside(model: nn.Module) -> dict[str, nn.Module]:
    """All modules that are no part of the repeated blocks, by name."""
    blocks = block_prefixes(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name and not f"{name}.".startswith(blocks)
    }


def block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of all modules in the repeated blocks begin with."""
    return tuple(f"{name}." if name else "" for name, _ in repeated_blocks(model))


def _outside(model: nn.Module) -> str:
    holders = [
        name
        for name, module in _modules_outside(model).items()
        if next(module.parameters(recurse=False), None) is not None
    ]
    shown = ", ".join(holders[-12:]) or "none"
    return f"{shown} (and {len(holders) - 12} before)" if len(holders) > 12 else shown


def output_heads(model: nn.Module) -> list[nn.Module]:
    """Output heads of the transformers models in ``model``, which may be wrapped in a module."""
    heads = []
    for module in model.modules():
        find = getattr(module, "get_output_embeddings", None)
        if find is None:
            continue
        try:
            heads.append(find())
        except (AttributeError, NotImplementedError):  # transformers models without a head
            continue
    return heads + [copy for head in heads if head is not None for copy in saved_heads(head)]


def head_modules(model: nn.Module) -> set[int]:
    """Ids of the modules of all heads: a language model's output embeddings, a task's layers."""
    parts = [head for head in output_heads(model) if head is not None]
    parts += [model.get_submodule(name) for name in task_head(model)]
    return {id(module) for part in parts for module in part.modules()}
