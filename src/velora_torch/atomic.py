"""Files and folders are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace a file in one step: until the new content is on disk, the old one stays.

    Args:
        path: file to write; its folder must exist.
        data: bytes, or text that is written as UTF-8.

    Raises:
        OSError: the content could not be written (a full disk, say); the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = data.encode(errors="replace") if isinstance(data, str) else data
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def install_folder(target: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a temporary folder, then move it to `target` in one step.

    Where another process has made `target` meanwhile, its copy stays.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(work)
        work.chmod(0o755)
        try:
            os.replace(work, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def keep_folder(target: Path, file: str, build: Callable[[Path], None]) -> None:
    """Make a folder as `install_folder` does, unless it is there with the file that it needs.

    One that has lost the file is made anew.
    """
    if not (target / file).is_file():
        shutil.rmtree(target, ignore_errors=True)
        install_folder(target, build)


def sync_folder(folder: Path) -> None:
    """Return when everything in a folder is on the disk: its files, and their names."""
    for parent, _, names in os.walk(folder):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            _sync(path)


def replace_folder(work: Path, target: Path) -> None:
    """Put a finished folder on the disk and in the place of another, if there is one.

    Both lie in one file system. Whoever looks finds the whole old folder or the whole new one, and
    for a moment none; the old one is then in the folder that `work` was in.
    """
    sync_folder(work)
    former = work.with_name(f"former-{target.name}")
    if target.exists():
        os.replace(target, former)
    try:
        os.replace(work, target)
    except BaseException:
        if former.exists():
            os.replace(former, target)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":  # folders can't be opened there
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
