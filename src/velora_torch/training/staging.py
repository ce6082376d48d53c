"""Where a run's checkpoints and its final model are written before they take their places.

A folder in the run's own, so that moving out of it is one step; what a killed process left in it
is removed by the next one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from velora_torch.atomic import replace_folder
from velora_torch.report.quantities import format_bytes

STAGING = ".velora-saving"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class SavingError(OSError):
    """A checkpoint or model can't be written; what was there before is untouched."""


def checkpoints(output: Path) -> list[Path]:
    """All checkpoints in a run's folder, the newest first."""
    found = output.glob("checkpoint-*") if output.is_dir() else ()
    numbered = [path for path in found if CHECKPOINT.fullmatch(path.name)]
    return sorted(numbered, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps before a checkpoint."""
    return int(checkpoint.name.partition("-")[2])


def clear(output: Path) -> None:
    """Remove what is half written, or half removed; what was about to be replaced goes back."""
    for former in (output / STAGING).glob("former-*"):
        target = output / former.name.removeprefix("former-")
        if not target.exists():
            os.replace(former, target)
    shutil.rmtree(output / STAGING, ignore_errors=True)


def place(output: Path, name: str) -> None:
    """Let a folder that is finished take its place in a run's folder."""
    replace_folder(output / STAGING / name, output / name)
    clear(output)


def discard(path: Path) -> None:
    """Remove a folder in a run's folder: at once as a whole, then piece by piece."""
    staging = path.parent / STAGING
    staging.mkdir(exist_ok=True)
    os.replace(path, staging / f"discarded-{path.name}")
    clear(path.parent)


def rotate(output: Path, written: Path, keep: int) -> None:
    """Keep a checkpoint that has just been written, and the newest before it.

    Newer ones are damaged: the run went on from before them.
    """
    others = [path for path in checkpoints(output) if path != written]
    before = [path for path in others if step_of(path) < step_of(written)]
    for path in others:
        if path not in before[: keep - 1]:
            discard(path)


@contextmanager
def explained(output: Path, what: str) -> Iterator[None]:
    """Say of an error of the disk what could not be written, and what there is.

    Raises:
        SavingError: something below could not be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has no class of its own for what the disk refuses.
        if type(error) is RuntimeError and not re.search(
            "inline_container|Writer|iostream", str(error)
        ):
            raise
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        clear(output)  # gives its space back
        newest = next(iter(checkpoints(output)), None)
        stands = "there is no earlier checkpoint"
        if newest is not None:
            stands = f"{newest} is untouched: go on from it with --resume"
        free = format_bytes(shutil.disk_usage(output).free)
        reason = " ".join(str(error).split())
        raise SavingError(
            f"{what} can't be written into {output}: {reason}\n{free} are free there; {stands}"
        ) from error
