"""A run's folder: what lies where in it, and which checkpoint a resumed run goes on from.

recipe.yaml        the recipe, complete: what --resume and `velora export` read
checkpoint-N/      a plain Hugging Face checkpoint after N steps, with what resuming needs
final/             the trained model
results.json  report.html  runs/ (TensorBoard)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from velora_torch import lock
from velora_torch.atomic import write_whole
from velora_torch.training.manifest import damage
from velora_torch.training.recipe import Recipe, load_recipe, recipe_to_yaml
from velora_torch.training.staging import checkpoints, clear, discard


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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out, and remove what a killed one was in the middle of writing.

        Raises:
            FolderError: another run is in there, or nothing can be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FolderError(f"{self.path} is a file; choose a folder with train.output=...")
        if int(os.environ.get("RANK", "0")):  # one process of a run has the lock for all
            yield
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(lock.alone(self.path, "velora train", "train.output=..."))
            except OSError as error:
                raise FolderError(
                    f"{self.path} can't be written ({error.strerror}); choose another folder with "
                    f"train.output=..."
                ) from None
            clear(self.path)
            for path in (self.recipe, self.results, self.report):
                for rest in self.path.glob(f".{path.name}.*.tmp"):
                    rest.unlink()
            yield

    def check(
        self, resume: bool, overwrite: bool, say: Callable[[str], None] = lambda line: None
    ) -> Path | None:
        """See that the folder can be used as asked; changes nothing.

        Returns:
            The checkpoint to go on from, if any.

        Raises:
            FolderError: the folder holds a run already, or has nothing to resume.
        """
        if resume:
            found = self.newest_checkpoint(say)
            say(f"going on from {found}")
            return found
        if self.recipe.exists() or checkpoints(self.path):
            if not overwrite:
                raise FolderError(
                    f"{self.path} holds a run already; go on with --resume, replace it with "
                    f"--overwrite, or choose another folder with train.output=..."
                )
        elif self.path.is_dir() and any(path.name != lock.NAME for path in self.path.iterdir()):
            raise FolderError(
                f"{self.path} is not empty and not a run; choose another folder with "
                f"train.output=..."
            )
        return None

    def begin(self, recipe: Recipe) -> None:
        """Start a new run: remove what an earlier one left, and write the recipe."""
        for path in (*checkpoints(self.path), self.final, self.path / "runs"):
            if path.exists():
                discard(path)
        for path in (self.results, self.report):
            path.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.recipe, recipe_to_yaml(recipe))

    def load_recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        if not self.recipe.is_file():
            raise FolderError(f"{self.path} is not the folder of a run: it has no recipe.yaml")
        return load_recipe(self.recipe)

    def newest_checkpoint(self, say: Callable[[str], None] = lambda line: None) -> Path:
        """The newest checkpoint that is whole: every byte is what was written.

        Args:
            say: shown what is wrong with those that are newer.

        Raises:
            FolderError: there is none.
        """
        wrong: list[str] = []
        for path in checkpoints(self.path):
            found = damage(path)
            if found is None:
                for line in wrong:
                    say(f"{line}; using {path.name}, which is whole")
                return path
            wrong.append(f"{path.name} can't be used: {found}")
        first = f"{self.path} has no complete checkpoint to go on from; start without --resume"
        raise FolderError("\n".join((first, *wrong)))

    def newest_model(self) -> Path:
        """The finished model, or the newest checkpoint of an interrupted run."""
        if _has_model(self.final):
            return self.final
        if not checkpoints(self.path):
            raise FolderError(f"{self.path} has neither a finished model nor a checkpoint")
        return self.newest_checkpoint()


def _has_model(folder: Path) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    return any((folder / name).is_file() for name in names)
