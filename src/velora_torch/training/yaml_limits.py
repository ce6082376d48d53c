"""What a YAML document may hold: aliases make few lines stand for more than memory holds."""

from __future__ import annotations

import re

import yaml

MOST_NODES = 100_000
"""Keys, values, lists and sections of a document whose aliases are written out."""
DEEPEST = 50
"""Lists and sections in one another."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What escapes can write and no file, path or tokenizer takes."""


class LimitError(ValueError):
    """A document is too large or too deep, holds itself, or no characters."""


def check_limits(root: yaml.Node) -> None:
    """Refuse a document whose values would be too many or too deep, or no text.

    Raises:
        LimitError: it is; the message says what is allowed.
    """
    _size(root, {}, [])


def _size(node: yaml.Node, known: dict[int, int], above: list[int]) -> int:
    """Nodes below and at a node, with aliases written out."""
    if id(node) in above:
        raise LimitError("an alias (*name) stands inside of what it names")
    if len(above) >= DEEPEST:
        raise LimitError(f"lists and sections are in one another more than {DEEPEST} deep")
    if id(node) in known:
        return known[id(node)]
    if isinstance(node, yaml.ScalarNode) and (found := _NO_TEXT.search(node.value)):
        raise LimitError(f"line {node.start_mark.line + 1} holds {found[0]!a}, no character")
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    above.append(id(node))
    total = 1 + sum(_size(part, known, above) for part in below)
    above.pop()
    if total > MOST_NODES:
        raise LimitError(f"its aliases stand for more than {MOST_NODES:,} values")
    known[id(node)] = total
    return total
