"""Where a run may write: a folder of its own, which is neither a file nor where its user works."""

from __future__ import annotations

import os
from pathlib import Path

from velora_torch.training.folder import FolderError


def check_output(output: str, resume: bool) -> None:
    """Refuse an output folder that cannot be one, before anything is read or written.

    A run may replace what is in its folder (`--overwrite`). It must not be asked to by a recipe in
    the folder that someone works in, or in one above it.

    Raises:
        FolderError: says what is wrong, and what to set.
    """
    choose = "choose another folder with train.output=..."
    path = Path(output)
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links
        raise FolderError(f"train.output cannot be {output[:80]!r} ({error}); {choose}") from None
    if not there.is_dir():
        raise FolderError(f"train.output: {there} is a file; {choose}")
    if not resume and Path.cwd().is_relative_to(os.path.realpath(path)):
        raise FolderError(f"train.output: {path} is the folder you are in, or above it; {choose}")
