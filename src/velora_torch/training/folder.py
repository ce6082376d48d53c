"""A run's folder: what lies where in it, and which checkpoint a resumed run goes on from.

recipe.yaml        the recipe, complete: what --resume and `velora export` read
checkpoint-N/      a plain Hugging Face checkpoint after N steps, with what resuming needs
final/             the trained model
results.json  report.html  runs/ (TensorBoard)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from velora_torch.atomic import write_whole
from velora_torch.checkpoint import JSON_FILE
from velora_torch.training.recipe import Recipe, load_recipe, recipe_to_yaml


class FolderError(ValueError):
    """A run's folder can't be used as asked."""


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.final = self.path / "final"
        self.results = self.path / "results.json"
        self.report = self.path / "report.html"

    def check(self, recipe: Recipe, resume: bool, overwrite: bool) -> Path | None:
        """See that the folder can be used as asked; changes nothing.

        Returns:
            The checkpoint to go on from, if any.

        Raises:
            FolderError: the folder holds a run already, or has nothing to resume.
        """
        if resume:
            found = self.newest_checkpoint(compressed=recipe.velora is not None)
            if found is None:
                raise FolderError(
                    f"{self.path} has no complete checkpoint to resume from; "
                    f"start the run without --resume"
                )
            return found
        if self.recipe.exists() or list(self.checkpoints()):
            if not overwrite:
                raise FolderError(
                    f"{self.path} holds a run already; go on with --resume, replace it with "
                    f"--overwrite, or choose another folder with train.output=..."
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FolderError(
                f"{self.path} is not empty and not a run; choose another folder with "
                f"train.output=..."
            )
        return None

    def begin(self, recipe: Recipe) -> None:
        """Start a new run: remove what an earlier one left, and write the recipe."""
        for path in (self.final, self.path / "runs", *self.checkpoints()):
            if path.exists():
                shutil.rmtree(path)
        for path in (self.results, self.report):
            path.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.recipe, recipe_to_yaml(recipe))

    def load_recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        if not self.recipe.is_file():
            raise FolderError(f"{self.path} is not the folder of a run: it has no recipe.yaml")
        return load_recipe(self.recipe)

    def checkpoints(self) -> Iterator[Path]:
        """All checkpoints, the newest first."""
        found = self.path.glob("checkpoint-*") if self.path.is_dir() else ()
        numbered = [p for p in found if re.fullmatch(r"checkpoint-\d+", p.name)]
        yield from sorted(numbered, key=lambda p: int(p.name.partition("-")[2]), reverse=True)

    def newest_checkpoint(self, compressed: bool) -> Path | None:
        """The newest checkpoint that was written to its end."""
        return next((p for p in self.checkpoints() if _is_complete(p, compressed)), None)

    def newest_model(self, compressed: bool) -> Path:
        """The finished model, or the newest checkpoint of an interrupted run."""
        if _has_model(self.final):
            return self.final
        found = self.newest_checkpoint(compressed)
        if found is None:
            raise FolderError(f"{self.path} has neither a finished model nor a whole checkpoint")
        return found


def _has_model(folder: Path) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    return any((folder / name).is_file() for name in names)


def _is_complete(folder: Path, compressed: bool) -> bool:
    """Whether the trainer came to the end of writing it: the trainer's state is written last."""
    try:
        json.loads((folder / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return _has_model(folder) and (not compressed or (folder / JSON_FILE).is_file())
