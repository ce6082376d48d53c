"""The precision that a recipe computes in."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from velora_torch.half_products import float32_products, slow_types
from velora_torch.training.schema import Recipe


def half_type(recipe: Recipe) -> torch.dtype | None:
    """The half-precision type that a recipe computes in; None where all is float32."""
    if recipe.dtype != "float32":
        return torch.float16 if recipe.dtype == "float16" else torch.bfloat16
    return torch.bfloat16 if recipe.train.autocast else None


def slow_type(recipe: Recipe) -> torch.dtype | None:
    """The same, if the CPU has no instructions for it."""
    dtype = half_type(recipe)
    return dtype if dtype in slow_types() else None


def products_of(*recipes: Recipe) -> AbstractContextManager[object]:
    """Compute the products of recipes' slow types through float32 while this is open."""
    return float32_products(tuple({dtype for recipe in recipes if (dtype := slow_type(recipe))}))


def precision(recipe: Recipe, device: str) -> AbstractContextManager[object]:
    """Autocast as the trainer has it, or nothing where the recipe has none.

    Args:
        recipe: its `train.autocast` and `dtype`.
        device: type of the device, such as "cpu".
    """
    if not recipe.train.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device, half_type(recipe))
