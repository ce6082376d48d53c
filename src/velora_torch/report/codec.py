"""Dataclasses as JSON values and back, checked field by field.

A number that is not finite is written as `null`, and read as NaN where a number is needed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

KindT = TypeVar("KindT")


def read_document(path: str | os.PathLike[str], schema: str, kind: type[KindT], what: str) -> KindT:
    """Read a file of a dataclass's fields and of `schema`, which names their meaning.

    Args:
        path: a JSON file.
        schema: the one that can be read here.
        kind: the dataclass.
        what: what such files are called in an error.

    Raises:
        ValueError: it is another file; the message says what is wrong with it.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise ValueError(f"{path}: not a whole JSON file (truncated?): {error}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(f'{path}: not {what} of velora-torch (no "schema" in it)')
    found = document.pop("schema")
    if found != schema:
        raise ValueError(f"{path}: its schema is {found!r}, and only {schema!r} can be read here")
    try:
        return typing.cast(KindT, decode(document, kind, ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def encode(value: Any, where: str) -> Any:
    """`value` as JSON values; numbers that are not finite become None.

    Args:
        value: dataclasses, mappings, sequences, numbers and texts, nested.
        where: what it is called in an error.

    Raises:
        TypeError: something else is in it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: encode(getattr(value, f.name), f"{where}.{f.name}") for f in fields}
    if isinstance(value, Mapping):
        return {str(key): encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    raise TypeError(f"{where}: a {type(value).__name__} can't be written as JSON")


def decode(value: Any, kind: Any, where: str) -> Any:
    """The JSON `value` as `kind`.

    Args:
        value: as `json.loads` gives it.
        kind: a dataclass, or one of the annotations of its fields: bool, int, float, str, Any,
            Literal, list, dict, or one of these with None.
        where: what it is called in an error.

    Raises:
        ValueError: it is something else; the message names the field.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, where)
    if kind is Any:
        return value
    if origin is types.UnionType:  # always "X | None" here
        return None if value is None else decode(value, arguments[0], where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {value!r} is none of {', '.join(map(repr, arguments))}")
        return value
    if origin is list and isinstance(value, list):
        return [decode(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: decode(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if kind is float and value is None:  # it was not finite when it was written
        return math.nan
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    expected = getattr(origin or kind, "__name__", str(kind))
    raise ValueError(f"{where}: expected {expected}, found {_found(value)}")


def _dataclass(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'}: expected an object, found {_found(value)}")
    hints = typing.get_type_hints(kind)
    dot = f"{where}." if where else ""
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{dot}{unknown[0]}: not a field of this schema")
    for f in dataclasses.fields(kind):
        optional = (
            f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        )
        if f.name not in value and not optional:
            raise ValueError(f"{dot}{f.name}: missing")
    return kind(**{k: decode(v, hints[k], f"{dot}{k}") for k, v in value.items()})


def _found(value: Any) -> str:
    """What a JSON value is, for a message."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
