"""One process at a time works in a folder; the lock goes with the process, however it ends."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

NAME = ".lock"
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
"""What file systems without locks answer (Lustre mounted without them, say)."""


@contextmanager
def alone(folder: Path, who: str, instead: str) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made where it is missing.

    Nothing of the lock stays: a folder that was made here goes again if nothing was put into it.

    Args:
        folder: what is locked.
        who: what works in it, for the message of the process that comes second.
        instead: how to choose another folder, for the same.

    Raises:
        ValueError: another process works in it.
        OSError: the folder can't be made or written.
    """
    if sys.platform == "win32":  # no such locks there
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _locked(folder, who, instead):
        try:
            yield
        finally:
            (folder / NAME).unlink(missing_ok=True)
            for path in made:
                if any(path.iterdir()):
                    break
                path.rmdir()


def _locked(folder: Path, who: str, instead: str) -> IO[str]:
    import fcntl

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read().strip() or "?"
            file.close()
            raise ValueError(
                f"another `{who}` (process {process}) is writing into {folder}; wait for it, or "
                f"choose another folder with {instead}"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                file.close()
                raise
            warnings.warn(
                f"{folder} lies on a file system without locks: see to it yourself that only one "
                f"process writes into it",
                stacklevel=4,
            )
        if _is_at(file, folder / NAME):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()  # the former holder has removed it meanwhile


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
