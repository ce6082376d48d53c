"""The precision that a recipe computes in."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from velora_torch.training.schema import Recipe


def precision(recipe: Recipe, device: str) -> AbstractContextManager[object]:
    """Autocast as the trainer has it, or nothing where the recipe has none.

    Args:
        recipe: its `train.autocast` and `dtype`.
        device: type of the device, such as "cpu".
    """
    import torch

    if not recipe.train.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device, torch.float16 if recipe.dtype == "float16" else torch.bfloat16)
