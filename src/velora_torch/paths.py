"""Paths as people write them, and the folder of what is kept."""

from __future__ import annotations

import os
from pathlib import Path


def as_path(name: str | Path) -> Path:
    """A path in which ~ stands for a home folder; as it is written where there is no such home."""
    path = Path(name)
    try:
        return path.expanduser()
    except (RuntimeError, ValueError):  # no such user; a name that holds a null byte
        return path


def cache_folder() -> Path:
    """The folder for what is made once: converted models, tokenizers, tokens, compiled C.

    `$VELORA_CACHE`, else `$XDG_CACHE_HOME/velora-torch`, else `~/.cache/velora-torch`.
    """
    if own := os.environ.get("VELORA_CACHE"):
        return as_path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "velora-torch"
