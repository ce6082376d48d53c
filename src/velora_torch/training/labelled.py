"""Texts with a class or a number each: data for classification and regression."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from velora_torch.training.assets import AssetError
from velora_torch.training.data import PreparedData, load_rows, some, split
from velora_torch.training.packaged.texts import TEXT_TASKS, check_texts, load_texts
from velora_torch.training.rows import LABELLED_GUESSES, Part, columns_of
from velora_torch.training.schema import Recipe
from velora_torch.training.sources import DataError, Rows, check_source, has_test_split

Label = int | float
LARGEST = sys.float_info.max
"""The largest number of a regression."""


@dataclass
class Labelled:
    """Texts, pairs of texts, and their labels."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[Label]


class PadLabelled:
    """Makes a batch: texts padded to multiples of 8, numbers in the precision of the loss."""

    def __init__(self, tokenizer: Any, number: torch.dtype) -> None:
        from transformers import DataCollatorWithPadding

        self._pad = DataCollatorWithPadding(tokenizer, padding=True, pad_to_multiple_of=8)
        self._number = number

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, T), labels (B)."""
        batch: dict[str, Tensor] = dict(self._pad(rows))
        if batch["labels"].is_floating_point():
            batch["labels"] = batch["labels"].to(self._number)
        return batch


def _number_type(recipe: Recipe) -> torch.dtype:
    """The type of a regression's logits where its loss is computed."""
    return torch.float32 if recipe.train.autocast else getattr(torch, recipe.dtype)


def check_labelled(name: str) -> None:
    """Raise `DataError` for data that are not there, without reading any."""
    if name not in TEXT_TASKS:
        check_source(name)
        return
    try:
        check_texts(name)
    except AssetError as error:
        raise DataError(f"{name}: {error}") from None


def prepare_labelled(recipe: Recipe, tokenizer: Any) -> PreparedData:
    """Load, split, limit and tokenise texts with labels."""
    train_part, held_part, classes = _parts(recipe)
    if recipe.task == "text-regression":
        classes = None
    elif classes is None:
        classes = classes_of(train_part)
    train = _labelled(train_part, classes)
    held = _labelled(held_part, classes)
    train_set, lengths, skipped = _tokenised(recipe, tokenizer, train, train_part)
    held_set = _tokenised(recipe, tokenizer, held, held_part)[0] if held.texts else None
    return PreparedData(
        "labelled",
        train_set,
        held_set,
        PadLabelled(tokenizer, _number_type(recipe)),
        classes=classes,
        stats={
            "format": "labelled",
            "source": recipe.data.train,
            "train_examples": len(train_set),
            "eval_examples": len(held.texts),
            "train_tokens": sum(lengths),
            "longest": max(lengths),
            "mean_length": sum(lengths) / len(lengths),
            "skipped": skipped,
        },
    )


def classes_of(part: Part) -> tuple[str, ...]:
    """The distinct labels of training rows: numbers in their order, else names in theirs."""
    found = {_label(row, part.columns["label"], where) for where, row in part}
    if all(isinstance(label, int) for label in found):
        return tuple(str(label) for label in sorted(found))
    return tuple(sorted(str(label) for label in found))


def _parts(recipe: Recipe) -> tuple[Part, Part, tuple[str, ...] | None]:
    """Training and held-out rows, and the names of the classes where the data bring them."""
    data, classes = recipe.data, None
    if data.train in TEXT_TASKS:
        try:
            packaged = load_texts(data.train)
        except AssetError as error:
            raise DataError(f"{data.train}: {error}") from None
        classes = packaged.classes
        if (classes is None) != (recipe.task == "text-regression"):
            other = "text-regression" if classes is None else "text-classification"
            raise DataError(f"{data.train} is for task: {other}, not for task: {recipe.task}")
        train_rows = [_row(text, label, classes) for text, label in packaged.train]
        test = packaged.test if has_test_split(data) else ()
        held_rows = [_row(text, label, classes) for text, label in test]
    else:
        train_rows, held_rows = load_rows(data)
    train = part_of(train_rows, recipe, data.train, "text")
    if held_rows:
        held = part_of(held_rows, recipe, data.eval or data.train, "text")
    else:
        train, held = split(train, data)
    return some(train, data.max_train, data.seed), some(held, data.max_eval, data.seed), classes


def _row(text: str, label: Label, classes: tuple[str, ...] | None) -> dict[str, Any]:
    return {"text": text, "label": label if classes is None else classes[int(label)]}


def part_of(rows: Rows, recipe: Recipe, source: str, needed: str) -> Part:
    """Rows with their columns named: what is needed, and a label."""
    columns = columns_of(rows, recipe.data.columns, source, LABELLED_GUESSES)
    missing = [name for name in (needed, "label") if name not in columns]
    if missing:
        raise DataError(
            f"{source}: task: {recipe.task} needs a column for {' and '.join(missing)}; "
            f"there are: {', '.join(rows[0])}. Name it under data.columns"
        )
    return Part(source, columns, rows, list(range(len(rows))))


def _labelled(part: Part, classes: tuple[str, ...] | None) -> Labelled:
    names = part.columns
    places = None if classes is None else {name: i for i, name in enumerate(classes)}
    texts, pairs, labels = [], [], []
    for where, row in part:
        texts.append(_text(row.get(names["text"]), where))
        if "text_pair" in names:
            pairs.append(_text(row.get(names["text_pair"]), where))
        labels.append(label_of(_label(row, names["label"], where), places, where))
    return Labelled(texts, pairs if "text_pair" in names else None, labels)


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    raise DataError(f"{where}: a text is needed, and there is {str(value)[:60]!r}")


def _label(row: dict[str, Any], column: str, where: str) -> Any:
    """What a row has for a label: a text or a number."""
    value = row.get(column)
    if isinstance(value, str | int | float):
        return value
    kind = "nothing" if value is None else f"a {type(value).__name__}"
    raise DataError(f"{where}: {column!r} holds {kind}; expected a class or a number")


def label_of(value: Any, places: dict[str, int] | None, where: str) -> Label:
    """A class by its place in the names (`places`), or the number of a regression."""
    if places is None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and abs(value) <= LARGEST:  # neither NaN nor infinite
            return float(value)
        raise DataError(
            f"{where}: the label of a regression must be a number, not {str(value)[:60]!r}"
        )
    if str(value) not in places:
        known = ", ".join(list(places)[:12])
        raise DataError(f"{where}: the class {value!r} is none of the training data's: {known}")
    return places[str(value)]


def _tokenised(
    recipe: Recipe, tokenizer: Any, labelled: Labelled, part: Part
) -> tuple[Any, list[int], int]:
    """The data set, the lengths of its sequences, and how many were skipped."""
    from datasets import Dataset

    data = recipe.data
    cut = data.too_long == "truncate"
    encoded = tokenizer(
        labelled.texts,
        labelled.pairs,
        truncation=cut,
        max_length=data.max_length if cut else None,
        verbose=False,
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    kept = [i for i, length in enumerate(lengths) if length <= data.max_length]
    if len(kept) < len(lengths) and data.too_long == "error":
        first = next(i for i, length in enumerate(lengths) if length > data.max_length)
        raise DataError(
            f"{part.source}: example {part.places[first]} has {lengths[first]} tokens, more than "
            f"data.max_length = {data.max_length} ({len(lengths) - len(kept)} such of "
            f"{len(lengths)}, the longest {max(lengths)}); raise data.max_length, or set "
            f"data.too_long to truncate or skip"
        )
    if not kept:
        raise DataError(f"{part.source}: no example is left within data.max_length tokens")
    rows = [
        {**{key: value[i] for key, value in encoded.items()}, "labels": labelled.labels[i]}
        for i in kept
    ]
    return Dataset.from_list(rows), [lengths[i] for i in kept], len(lengths) - len(kept)
