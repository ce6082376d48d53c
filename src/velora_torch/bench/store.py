"""Files of one JSON object per line that grow: a line is there as a whole, or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

RecordT = TypeVar("RecordT")


def append_line(path: Path, document: Mapping[str, Any]) -> None:
    """Add a line, and return when it is on the disk.

    What a crash left of an unfinished line is cut off first, and so is what this call has
    written if it fails (a full disk, say).

    Raises:
        OSError: the line could not be written; the file is as it was.
        ValueError: a number in `document` is not finite.
    """
    line = json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = _whole_lines(file)
        os.ftruncate(file, end)
        os.lseek(file, end, os.SEEK_SET)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        except OSError:
            os.ftruncate(file, end)
            raise
    finally:
        os.close(file)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a file; none where there is no file.

    Raises:
        ValueError: a whole line is not a JSON object.
    """
    if not path.is_file():
        return
    raw = path.read_bytes()
    *whole, _unfinished = raw.split(b"\n")
    for number, line in enumerate(whole, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
            raise ValueError(
                f"{path}:{number}: not valid JSON ({error}); remove the line"
            ) from None
        if not isinstance(document, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object; remove the line")
        yield document


def read_records(path: Path, kind: type[RecordT], what: str) -> list[RecordT]:
    """The lines of a file as dataclasses, in their order.

    Args:
        path: the file.
        kind: a dataclass with the fields of each line; a line may lack those with a default, which
            lines from before such a field do.
        what: what a line is, for the message.

    Raises:
        ValueError: a line has other fields.
    """
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    needed = {
        name
        for name, item in fields.items()
        if item.default is item.default_factory is dataclasses.MISSING
    }
    records: list[RecordT] = []
    for number, document in enumerate(read_lines(path), 1):
        if not needed <= document.keys() <= fields.keys():
            raise ValueError(f"{path}: line {number} is not {what}; remove it")
        records.append(kind(**document))
    return records


def _whole_lines(file: int) -> int:
    """Bytes up to the end of the last finished line."""
    end = os.lseek(file, 0, os.SEEK_END)
    block = 4096
    while end:
        start = max(0, end - block)
        os.lseek(file, start, os.SEEK_SET)
        at = os.read(file, end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
