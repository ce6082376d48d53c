"""Whether a grid can run at all: packages, data and models, before any work."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from velora_torch.bench.cell import recipe_of
from velora_torch.bench.grid import Cell, Scale
from velora_torch.training.assets import check_model
from velora_torch.training.schema import Recipe


def check_grid(scale: Scale, grid: Sequence[Cell]) -> None:
    """Check what the cells of a grid need; what other cells would need is not asked for.

    Raises:
        ValueError: a package, a model or a data set is missing; all of them are named.
    """
    from velora_torch.training.data import check_sources
    from velora_torch.training.models import check_settings

    problems: dict[str, None] = {}
    for package, install in scale.needs:
        if importlib.util.find_spec(package) is None:
            problems[f"the package {package} is not installed: {install}"] = None
    seen: set[tuple[object, ...]] = set()
    for cell in grid:
        if cell.seed:
            continue  # all seeds need the same
        recipe = recipe_of(cell, "unused")
        problems |= _problem(check_settings, recipe)
        asked = (
            recipe.task,
            recipe.model,
            recipe.data.train,
            recipe.data.eval,
            recipe.evaluate.perplexity,
            recipe.train.optimizer,
        )
        if asked not in seen:  # the hub is asked once
            seen.add(asked)
            problems |= _problem(check_sources, recipe)
            problems |= _problem(lambda recipe: check_model(recipe.model), recipe)
    if problems:
        raise ValueError("the bench cannot run:\n  " + "\n  ".join(problems))


def _problem(check: Callable[[Recipe], None], recipe: Recipe) -> dict[str, None]:
    """What a check complains of; a dict, so that the same complaint comes once."""
    try:
        check(recipe)
    except ValueError as error:
        return {str(error): None}
    return {}
