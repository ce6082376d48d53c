"""Documents of a corpus, one at a time: packaged text, a file, a folder of files, or the hub.

A document is held out or trained on by a hash of its text, so that the split needs no second pass,
is the same in any order, and keeps copies of a document on one side. The same hash shuffles: a run
that takes a part of the text takes it from everywhere, and an added document moves no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from velora_torch.paths import as_path
from velora_torch.training.assets import AssetError
from velora_torch.training.packaged.manuals import (
    MANUALS,
    check_manuals,
    load_manuals,
    manual_files,
)
from velora_torch.training.rows import columns_of
from velora_torch.training.sections import DataSection
from velora_torch.training.sources import (
    SUFFIXES,
    DataError,
    check_source,
    hub_stream,
    kind_of,
    read_json,
    read_rows,
)

Side = Literal["train", "eval"]
BLOCK = 1 << 26
"""Characters that are shuffled at a time; a longer text is shuffled block by block."""
SECTION = 8192
"""Characters after which a plain text file may be cut into documents, at the next blank line; after
twice as many at the end of a line, and a line that is longer at a space."""


def check_corpus(name: str) -> None:
    """Raise `DataError` for text that is not there, without reading it."""
    if name in MANUALS:
        try:
            check_manuals(name)
        except AssetError as error:
            raise DataError(str(error)) from None
    elif as_path(name).is_dir():
        _files(name)
    else:
        check_source(name, also=MANUALS)


def documents(data: DataSection, side: Side) -> Iterator[str]:
    """Yield the documents to train on, or those that are held out.

    Args:
        data: names the sources, the split and the text's column; `max_train` and `max_eval` count
            documents. With `shuffle`, documents come in an order that depends on `seed` and their
            text, else in that of the source.
        side: which of the two.

    Raises:
        DataError: the source is missing, unreadable or has no text; nothing is held out.
    """
    limit = data.max_train if side == "train" else data.max_eval
    found = islice(_all(data, side), limit)
    first = next(found, None)
    if first is None:
        raise DataError(f"{source_of(data, side)}: {_why_empty(data, side)}")
    yield first
    yield from found


def source_of(data: DataSection, side: Side) -> str:
    """The name of the text that a side is read from."""
    return data.eval if side == "eval" and data.eval is not None else data.train


def is_split(data: DataSection) -> bool:
    """Whether what is held out are documents of the text to train on."""
    return data.eval is None and data.eval_split is None


def _why_empty(data: DataSection, side: Side) -> str:
    if not is_split(data):
        return "there is no document in it"
    if side == "eval":
        return (
            "no document is held out; raise data.eval_fraction, or name other text with data.eval"
        )
    return "no document is to train on; lower data.eval_fraction"


def identity(data: DataSection) -> dict[str, Any]:
    """What tells one corpus from another: its settings, and size and date of its local files.

    Tokens that were made before are taken again for an equal identity. A hub data set counts as
    the same as long as its name is.
    """
    fields = (
        "train",
        "eval",
        "eval_fraction",
        "subset",
        "train_split",
        "eval_split",
        "seed",
        "shuffle",
    )
    limits = ("max_train", "max_eval")
    settings = {field: getattr(data, field) for field in (*fields, *limits)}
    sources = (data.train, *([data.eval] if data.eval else []))
    files = [_state(name) for name in sources]
    if any(path.endswith(".txt") for states in files for path, *_ in states or ()):
        settings["sections"] = 2  # changes with where a text is cut
    return {**settings, "text": data.columns.text, "files": files}


def _all(data: DataSection, side: Side) -> Iterator[str]:
    if side == "eval" and data.eval is not None:
        texts = _read(data, data.eval, data.eval_split or data.train_split)
    elif side == "eval" and data.eval_split is not None:
        texts = _read(data, data.train, data.eval_split)
    else:
        texts = _read(data, data.train, data.train_split)
    numbered: Iterator[tuple[int, str]] = ((_hash(text, data), text) for text in texts)
    if data.shuffle:
        numbered = _shuffled(numbered)
    split = is_split(data)
    held_out_below = data.eval_fraction * 2**64
    for number, text in numbered:
        if not split or (number < held_out_below) == (side == "eval"):
            yield text


def _shuffled(numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Blocks of a stream, each in the order of its documents' numbers."""
    block: list[tuple[int, str]] = []
    size = 0
    for number, text in numbered:
        block.append((number, text))
        size += len(text)
        if size >= BLOCK:
            yield from sorted(block)
            block, size = [], 0
    yield from sorted(block)


def _hash(text: str, data: DataSection) -> int:
    """A number in [0, 2^64), as good as drawn at random for each text and seed."""
    digest = hashlib.sha256(f"{data.seed}\n{text}".encode("utf-8", errors="replace")).digest()
    return int.from_bytes(digest[:8], "big")


def _read(data: DataSection, name: str, split: str) -> Iterator[str]:
    """All documents of a source that have text in them."""
    check_corpus(name)
    if name in MANUALS:
        texts = load_manuals(name)
    elif as_path(name).is_dir():
        texts = (text for file in _files(name) for text in _file(data, file))
    elif kind_of(name) == "file":
        texts = _file(data, as_path(name))
    elif kind_of(name) == "packaged":
        texts = _texts(data, iter(read_rows(name)), name)
    else:
        texts = _texts(data, hub_stream(name, split, data.subset), name)
    return (text for text in texts if text.strip())


def _files(name: str) -> list[Path]:
    folder = as_path(name)
    found = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"{name}: the folder holds no file that can be read ({' '.join(SUFFIXES)})")
    return found


def _file(data: DataSection, path: Path) -> Iterator[str]:
    """Documents of a file; lines of JSON and groups of Parquet are read one after the other."""
    check_source(str(path))
    if path.suffix == ".txt":
        yield from _sections(path)
    elif path.suffix == ".jsonl":
        yield from _texts(data, _lines(path), str(path))
    elif path.suffix == ".parquet":
        yield from _texts(data, _parquet(path), str(path))
    else:
        yield from _texts(data, iter(read_rows(str(path))), str(path))


def _sections(path: Path) -> Iterator[str]:
    """A text in documents of `SECTION` characters and a little more, cut where it can be."""
    part: list[str] = []
    size = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in chain.from_iterable(map(_pieces, file)):
                if size >= (SECTION if not line.strip() else 2 * SECTION):
                    yield "".join(part)
                    part, size = [], 0
                part.append(line)
                size += len(line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 text (byte {error.object[error.start]:#04x})"
        ) from None
    yield "".join(part)


def _pieces(line: str) -> Iterator[str]:
    """A line, or the parts of a very long one, each ended by a space if it has one."""
    start = 0
    while len(line) - start > 2 * SECTION:
        end = line.rfind(" ", start + SECTION // 2, start + SECTION) + 1 or start + SECTION
        yield line[start:end]
        start = end
    yield line[start:]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = read_json(line, path, number)
                    if not isinstance(row, dict):
                        raise DataError(
                            f"{path}:{number}: expected an object {{...}} on every line"
                        )
                    yield row
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text (after line {number})") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _texts(data: DataSection, rows: Iterator[dict[str, Any]], source: str) -> Iterator[str]:
    """The text column of rows."""
    column: str | None = None
    for number, row in enumerate(rows):
        if column is None:
            column = columns_of([row], data.columns, source).get("text")
            if column is None:
                raise DataError(
                    f"{source}: can't tell which column is the text; there are: {', '.join(row)}. "
                    f"Name it: data.columns.text"
                )
        text = row.get(column)
        if not isinstance(text, str):
            kind = "nothing" if text is None else f"a {type(text).__name__}"
            raise DataError(f"{source}: example {number}: {column!r} holds {kind}; expected text")
        yield text


def _state(name: str) -> list[tuple[str, int, int]] | None:
    """Paths, sizes and dates of a source's files; None for the hub and packaged data."""
    path = as_path(name)
    if name in MANUALS:
        files = manual_files(name)
    elif path.is_dir():
        files = _files(name)
    elif path.is_file():
        files = [path]
    else:
        return None
    stats = [(str(file), file.stat()) for file in files]
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
