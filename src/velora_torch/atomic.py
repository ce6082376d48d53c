"""Files are written whole or not at all."""

from __future__ import annotations

import os
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
