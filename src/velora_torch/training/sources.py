"""Rows of a data set, from wherever a recipe says: packaged, a local file, or the hub.

Files are read here rather than by `datasets`, so that an error can name the line at fault.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from velora_torch.paths import as_path
from velora_torch.training.assets import DATA_SETS, AssetError, check_packaged, load_packaged
from velora_torch.training.sections import DataSection

SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")

Rows = list[dict[str, Any]]


class DataError(ValueError):
    """The data can't be found, read or used."""


def kind_of(name: str) -> str:
    """Tell "packaged", "file" or "hub" data apart; a name that looks like a file is one."""
    if name in DATA_SETS:
        return "packaged"
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or name.endswith(SUFFIXES) or Path(name).exists():
        return "file"
    return "hub"


def has_test_split(data: DataSection) -> bool:
    """Whether packaged data are scored on their own test split, not on part of the training split.

    Raises:
        DataError: `eval_split` names neither.
    """
    if data.eval_split not in (None, "test", "train"):
        raise DataError(
            f"data.eval_split: {data.train} has the splits 'train' and 'test', "
            f"not {data.eval_split!r}"
        )
    return data.eval_split != "train"


def check_source(name: str, also: Sequence[str] = ()) -> None:
    """Raise `DataError` for data that are not there, without reading any.

    The hub is asked (one request) about data that its local cache lacks.

    Args:
        name: packaged data, a file, or a hub data set.
        also: more names that would have been known, to say so.
    """
    kind = kind_of(name)
    if kind == "packaged":
        try:
            check_packaged(name)
        except AssetError as error:
            raise DataError(f"{name}: {error}") from None
    elif kind == "file":
        _existing_file(name)
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"{name!r} is not a file, not a packaged data set, and not a hub name")
    elif not _in_hub_cache(name):
        _ask_hub(name, (*also, *DATA_SETS))


def read_rows(name: str, split: str = "train", subset: str | None = None) -> Rows:
    """Read all rows of a packaged data set's training part, a file, or a hub data set's split."""
    kind = kind_of(name)
    if kind == "packaged":
        return list(read_packaged(name)[0])
    rows = _read_file(_existing_file(name)) if kind == "file" else _read_hub(name, split, subset)
    if not rows:
        raise DataError(f"{name}: the data set is empty")
    return rows


def read_packaged(name: str) -> tuple[Rows, Rows]:
    """Return the training rows and the held-out rows of a packaged data set."""
    try:
        data = load_packaged(name)
    except AssetError as error:
        raise DataError(f"{name}: {error}") from None
    return [dict(row) for row in data.train], [dict(row) for row in data.held_out]


def _existing_file(name: str) -> Path:
    path = as_path(name)
    if path.is_dir():
        raise DataError(f"{name}: is a folder; expected a file ({' '.join(SUFFIXES)})")
    if not path.is_file():
        raise DataError(f"{name}: no such file{_nearest(path)}")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{name}: unknown kind of file; known: {' '.join(SUFFIXES)}")
    return path


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder {folder})"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    near = difflib.get_close_matches(path.name, names, 3, 0.4)
    if near:
        return f"; did you mean {' or '.join(str(folder / n) for n in near)}?"
    return f"; data files in {folder}: {', '.join(names[:8]) or 'none'}"


def _read_file(path: Path) -> Rows:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: is not UTF-8 text (byte {raw[error.start]:#04x})"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt}
    return list(readers[path.suffix](path, text))


def _jsonl(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # other line ends may be inside strings
        if not line.strip():
            continue
        row = read_json(line, path, number)
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected an object {{...}} on every line")
        yield row


def read_json(text: str, path: Path, number: int | None = None) -> Any:
    """The value that a text of JSON stands for.

    Args:
        text: the content of a file, or a line of it.
        path: the file, for errors.
        number: the line's, from 1; None for a whole file.

    Raises:
        DataError: it is not JSON, too deep, or holds half of a pair of surrogates, which stands
            for no character, and no tokenizer takes it.
    """
    where = f"{path}:{number}" if number else str(path)
    try:
        value = json.loads(text)
        if "\\u" in text:  # an escape: any other half is no UTF-8 in the first place
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        if number:
            what = f"{error.msg} (column {error.colno})"
        else:
            where = f"{path}:{error.lineno}"
            hint = "; a file with one object per line is named .jsonl"
            what = error.msg + hint * (error.msg == "Extra data")
        raise DataError(f"{where}: not valid JSON: {what}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{where}: holds \\u{ord(half):04x}, half of a pair of surrogates: no character"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: lists and objects are too deep in one another") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: {error}") from None
    return value


def _json(path: Path, text: str) -> Iterator[dict[str, Any]]:
    data = read_json(text, path)
    if isinstance(data, dict):  # {"data": [...]}, as datasets publish it
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else data
    if not isinstance(data, list):
        raise DataError(f"{path}: expected a list of objects")
    for index, row in enumerate(data):
        if not isinstance(row, dict):
            raise DataError(f"{path}: item {index} is not an object {{...}}")
        yield row


def _csv(path: Path, text: str) -> Iterator[dict[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: has {len(row)} fields, the header {len(header)}"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _txt(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for part in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        if part.strip():
            yield {"text": part.strip("\n")}


def _read_parquet(path: Path) -> Rows:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _in_hub_cache(name: str) -> bool:
    import datasets.config
    from huggingface_hub.constants import HF_HUB_CACHE

    flat = name.replace("/", "___")
    prepared = Path(datasets.config.HF_DATASETS_CACHE, flat)
    downloaded = Path(HF_HUB_CACHE, "datasets--" + name.replace("/", "--"))
    return prepared.exists() or downloaded.exists()


def _ask_hub(name: str, packaged: Sequence[str]) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise DataError(
            f"{name!r} is not a file, not a packaged data set ({', '.join(packaged)}), "
            "and the hub has no data set of that name that is open to you"
        ) from None
    except Exception as error:  # whatever keeps it from answering, the user reads why
        raise _unreachable(name, str(error).partition("\n")[0], packaged) from None


def _unreachable(name: str, why: str, packaged: Sequence[str] = DATA_SETS) -> DataError:
    near = difflib.get_close_matches(name, packaged, 2, 0.5)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"packaged: {', '.join(packaged)}"
    )
    return DataError(
        f"{name!r} is not a file, not a packaged data set ({hint}), "
        f"and the hub could not be reached ({why})"
    )


def hub_stream(name: str, split: str, subset: str | None) -> Iterator[dict[str, Any]]:
    """Rows of a hub data set's split, read as they come, without a download of the whole."""
    import datasets

    try:
        yield from datasets.load_dataset(name, subset, split=split, streaming=True)
    except OSError as error:
        raise _unreachable(name, str(error).partition("\n")[0]) from None
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None


def _read_hub(name: str, split: str, subset: str | None) -> Rows:
    import datasets

    check_source(name)  # fails at once where load_dataset would try for half a minute
    try:
        return list(datasets.load_dataset(name, subset, split=split))
    except OSError as error:  # ConnectionError and the hub's own errors are OSErrors
        raise _unreachable(name, str(error).partition("\n")[0]) from None
    except ValueError as error:  # unknown split or configuration: the message lists what exists
        raise DataError(f"{name}: {error}") from None
