"""Ids of test cases that are the same in every process, so that processes can share the tests."""

from __future__ import annotations

from typing import Any


def as_id(value: Any) -> str:
    """A value as text, without addresses and without the order of a set."""
    if callable(value):
        return "function"
    return str(sorted(value) if isinstance(value, set) else value)
