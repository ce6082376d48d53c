"""Runs of `velora train` on the tiny architecture, for several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from velora_torch.layers.watching import LIVE
from velora_torch.sharding import is_sharded
from velora_torch.training.recipe import load_recipe
from velora_torch.training.run import Options, run


def go(
    path: Path, strategy: Any, overrides: list[str], **options: Any
) -> tuple[list[float], list[str], bool]:
    """Train; the losses, what was said, and whether coefficients were sharded."""
    said: list[str] = []
    chosen = Options(report=False, strategy=strategy, **options)
    results = run(load_recipe(path, overrides), chosen, said.append)
    sharded = any(is_sharded(layer._parameters["coef"]) for layer in LIVE)
    return [point.loss for point in results.history], said, sharded


def final(folder: Path) -> dict[str, Tensor]:
    """The weights that a run has ended with."""
    return load_file(folder / "final" / "model.safetensors")


def overrides(place: Path, name: str, **more: Any) -> list[str]:
    """Changes to the recipe in `place`, for a run of that name."""
    settings = {"steps": 8, "save_every": 3, "keep": 9, "batch_size": 4, **more}
    given = [f"train.{key}={value}" for key, value in settings.items()]
    return [*given, "train.tokens=null", "evaluate.max_examples=8", f"train.output={place / name}"]
