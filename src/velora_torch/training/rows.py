"""What the columns of a data set mean: instruction examples, conversations, or plain texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from velora_torch.training.sections import ColumnsSection, DataSection
from velora_torch.training.sources import DataError, Rows
from velora_torch.training.templates import Example

Format = Literal["instruction", "chat", "text"]
Guesses = dict[str, tuple[str, ...]]

# Common names, the likeliest first.
GUESSES: Guesses = {
    "instruction": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion", "target"),
    "text": ("text", "content"),
    "messages": ("messages", "conversations", "conversation"),
}
# For classification and regression, where "question" is a text and not a task.
LABELLED_GUESSES: Guesses = {
    "text": ("text", "sentence", "sentence1", "question1", "question", "premise", "content"),
    "text_pair": ("text_pair", "sentence2", "question2", "hypothesis"),
    "image": ("image", "img", "pixel_values"),
    "label": ("label", "labels", "class", "score", "fine_label"),
}
NEEDED: dict[Format, tuple[str, ...]] = {
    "instruction": ("instruction", "output"),
    "chat": ("messages",),
    "text": ("text",),
}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # as ShareGPT names them


@dataclass
class Part:
    """Rows of one side of the split, with their places in the source (from 0) for errors."""

    source: str
    columns: dict[str, str]
    rows: Rows
    places: list[int]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield where each row comes from, and the row."""
        for place, row in zip(self.places, self.rows, strict=True):
            yield f"{self.source}: example {place}", row

    def select(self, indices: Sequence[int]) -> Part:
        """Return some of the rows."""
        rows, places = [self.rows[i] for i in indices], [self.places[i] for i in indices]
        return Part(self.source, self.columns, rows, places)


def columns_of(
    rows: Rows, asked: ColumnsSection, source: str, known: Guesses = GUESSES
) -> dict[str, str]:
    """Map our names to the data's: those the recipe gives, which must exist, then guesses."""
    found = list(rows[0])
    mapping: dict[str, str] = {}
    for ours, guesses in known.items():
        theirs = getattr(asked, ours)
        if theirs is not None and theirs not in found:
            near = difflib.get_close_matches(theirs, found, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{source}: no column {theirs!r} (data.columns.{ours}); "
                f"there are: {', '.join(found)}{hint}"
            )
        theirs = theirs or next((g for g in guesses if g in found), None)
        if theirs is not None:
            mapping[ours] = theirs
    return mapping


def format_of(data: DataSection, columns: dict[str, str], rows: Rows, source: str) -> Format:
    """Return the format that a recipe asks for, or the one that the columns show."""
    if data.format is not None:
        missing = [name for name in NEEDED[data.format] if name not in columns]
        if not missing:
            return data.format
        raise DataError(
            f"{source}: data.format {data.format!r} needs a column for {' and '.join(missing)}; "
            f"there are: {', '.join(rows[0])}. Name it under data.columns"
        )
    # A recipe that names a column decides; otherwise the richer format wins.
    named = {name for name, column in data.columns.model_dump().items() if column is not None}
    order: list[Format] = ["chat", "instruction", "text"]
    order.sort(key=lambda f: not named & set(NEEDED[f]))
    for kind in order:
        if all(name in columns for name in NEEDED[kind]):
            return kind
    raise DataError(
        f"{source}: can't tell what to learn from the columns {', '.join(rows[0])}; name them "
        "under data.columns: instruction and output (and input), or messages, or text"
    )


def examples_of(part: Part) -> list[Example]:
    """Read instruction examples."""
    names = part.columns
    examples = []
    for where, row in part:
        task = _text(row, names["instruction"], where)
        answer = _text(row, names["output"], where)
        given = row.get(names["input"]) if "input" in names else None
        text = "" if given is None else _text(row, names["input"], where)
        examples.append(Example(task, text, answer))
    return examples


def texts_of(part: Part) -> list[str]:
    """Read plain texts."""
    return [_text(row, part.columns["text"], where) for where, row in part]


def conversations_of(part: Part, system: str | None) -> list[list[dict[str, str]]]:
    """Read conversations; `system` opens those that have no system message."""
    column = part.columns["messages"]
    conversations = []
    for where, row in part:
        value = row.get(column)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise DataError(f"{where}: {column!r} is not a list of messages")
        messages = [_message(item, where) for item in value]
        if not any(m["role"] == "assistant" for m in messages):
            raise DataError(f"{where}: has no message of the assistant to learn")
        if messages[0]["role"] == "assistant":
            raise DataError(
                f"{where}: begins with the assistant's message, which answers nothing; put the "
                f"user's before it, or leave it out"
            )
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        conversations.append(messages)
    return conversations


def _message(item: Any, where: str) -> dict[str, str]:
    if isinstance(item, dict):
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": ROLES.get(role, role), "content": content}
    raise DataError(
        f"{where}: a message must be {{role: text, content: text}}, not {str(item)[:60]}"
    )


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise DataError(f"{where} has no {column!r}; it has: {', '.join(row) or 'nothing'}")
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    kind = "nothing" if value is None else f"a {type(value).__name__}"
    raise DataError(f"{where}: {column!r} holds {kind}; expected text")
