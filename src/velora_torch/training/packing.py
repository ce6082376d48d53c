"""Sequences of one fixed length, filled with several examples that don't see each other.

Every example's positions start at 0, and no attention mask is given: from that, transformers
builds a mask that keeps the examples apart, in all of its attention implementations. It does so
only without a cache of keys and values: the Trainer turns that off, other code must pass
`use_cache=False`. The first token of an example is never a target, since its predecessor is
another's last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

IGNORED = -100  # the label that the loss leaves out


@dataclass(frozen=True)
class Tokens:
    """Tokens, and for each the label: itself, or `IGNORED`."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class _Row:
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)

    def add(self, part: Tokens) -> None:
        self.input_ids += part.input_ids
        self.labels += [IGNORED, *part.labels[1:]]
        self.position_ids += range(len(part))

    def padded(self, length: int, pad_id: int) -> dict[str, list[int]]:
        if (rest := length - len(self.input_ids)) > 0:
            self.add(Tokens([pad_id] * rest, [IGNORED] * rest))
        return vars(self)


def pack_whole(
    examples: Iterable[Tokens], length: int, pad_id: int, open_rows: int = 64
) -> Iterator[dict[str, list[int]]]:
    """Put whole examples together: each into the fullest of the last rows where it fits."""
    rows: list[_Row] = []
    for example in examples:
        assert len(example) <= length
        fitting = [row for row in rows if len(row.input_ids) + len(example) <= length]
        if fitting:
            row = max(fitting, key=lambda r: len(r.input_ids))
        else:
            if len(rows) == open_rows:
                fullest = max(range(open_rows), key=lambda i: len(rows[i].input_ids))
                yield rows.pop(fullest).padded(length, pad_id)
            rows.append(row := _Row())
        row.add(example)
    for row in rows:
        yield row.padded(length, pad_id)


def pack_text(
    documents: Iterable[Tokens], length: int, pad_id: int
) -> Iterator[dict[str, list[int]]]:
    """Fill rows with documents one after the other; one that passes a row's end is cut there.

    The piece after a cut starts a row with positions from 0. Only the last row is padded.
    """
    row = _Row()
    for document in documents:
        start = 0
        while start < len(document):
            end = min(len(document), start + length - len(row.input_ids))
            row.add(Tokens(document.input_ids[start:end], document.labels[start:end]))
            start = end
            if len(row.input_ids) == length:
                yield vars(row)
                row = _Row()
    if row.input_ids:
        yield row.padded(length, pad_id)
