"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path


def as_path(name: str | Path) -> Path:
    """A path in which ~ stands for a home folder; as it is written where there is no such home."""
    path = Path(name)
    try:
        return path.expanduser()
    except (RuntimeError, ValueError):  # no such user; a name that holds a null byte
        return path
