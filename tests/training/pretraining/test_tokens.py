"""Tokens on the disk, their windows and their order; the trained vocabulary."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from tests.training.pretraining import texts
from velora_torch.training.pretraining.tokenizer import END, train_bpe
from velora_torch.training.pretraining.tokens import FILE, TokenWindows, spread, tokenise
from velora_torch.training.sources import DataError

DOCUMENTS = [*texts.documents(), "naïve 123 \t\n  ünïcode 😀 \x00"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(iter(DOCUMENTS), 400, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def file(tokenizer, tmp_path_factory):
    return make(tokenizer, tmp_path_factory.mktemp("tokens") / "all")


def make(tokenizer, folder, limit=None):
    return tokenise(lambda: DOCUMENTS, tokenizer, folder, limit, lambda line: None)


@pytest.mark.parametrize("text", DOCUMENTS[-3:])
def test_a_trained_vocabulary_gives_any_text_back(tokenizer, text):
    assert len(tokenizer) == 400
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END != tokenizer.pad_token


def test_a_vocabulary_is_the_same_each_time(tokenizer, tmp_path):
    train_bpe(iter(DOCUMENTS), 400, tmp_path)
    first = tokenizer.backend_tokenizer.to_str()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.to_str() == first


def test_the_file_is_all_documents_each_ended(tokenizer, file):
    ids = np.asarray(file.tokens_N)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert len(ends) == file.documents == len(DOCUMENTS)
    parts = np.split(ids, ends + 1)
    assert [tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]] == DOCUMENTS


def test_a_limit_stops_the_reading(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("velora_torch.training.pretraining.tokens.BATCH", 8)
    read = []

    def source():
        for text in DOCUMENTS:
            read.append(text)
            yield text

    short = tokenise(source, tokenizer, tmp_path / "short", 500, lambda line: None)
    assert len(short) >= 500
    assert len(read) < len(DOCUMENTS)


def test_a_file_is_made_once(tokenizer, tmp_path):
    make(tokenizer, tmp_path / "all")

    def fail():
        raise AssertionError

    tokenise(fail, tokenizer, tmp_path / "all", None, lambda line: None)


def test_an_interrupted_file_leaves_nothing(tokenizer, tmp_path):
    def source():
        yield DOCUMENTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenise(source, tokenizer, tmp_path / "all", None, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_cut_file_is_told(tokenizer, tmp_path):
    make(tokenizer, tmp_path / "all")
    path = tmp_path / "all" / FILE
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"was cut or changed\. Remove .*, and it is made again"):
        make(tokenizer, tmp_path / "all")


def test_windows_without_a_seed_are_the_file(file):
    windows = TokenWindows(file, 16)
    rows = torch.cat([row["input_ids"] for row in windows])
    assert rows.tolist() == file.tokens_N[: len(windows) * 16].tolist()
    assert all(torch.equal(row["labels"], row["input_ids"]) for row in windows)


def test_each_pass_has_every_window_once_in_its_own_order(file):
    count = TokenWindows(file, 16).windows
    windows = TokenWindows(file, 16, 2 * count + 3, seed=5)
    rows = [tuple(windows[i]["input_ids"].tolist()) for i in range(len(windows))]
    plain = sorted(tuple(row["input_ids"].tolist()) for row in TokenWindows(file, 16))
    assert sorted(rows[:count]) == sorted(rows[count : 2 * count]) == plain
    assert rows[:count] != rows[count : 2 * count]


def test_a_window_depends_on_its_place_alone(file):
    first, second = (TokenWindows(file, 16, 1000, seed=3) for _ in range(2))
    places = [999, 0, 500, 999, 1]
    for place in places:
        assert torch.equal(first[place]["input_ids"], second[place]["input_ids"])
    longer = TokenWindows(file, 16, 2000, seed=3)
    assert torch.equal(first[7]["input_ids"], longer[7]["input_ids"])
    assert not torch.equal(first[7]["input_ids"], TokenWindows(file, 16, seed=4)[7]["input_ids"])


def test_windows_end(file):
    windows = TokenWindows(file, 16, 3)
    assert len(list(windows)) == len(windows) == 3
    with pytest.raises(IndexError):
        windows[3]


def test_windows_are_spread_over_the_whole_file(file):
    whole = [row["input_ids"] for row in TokenWindows(file, 16)]
    for count in (1, 2, 7, len(whole) - 1, len(whole)):
        some = spread(TokenWindows(file, 16), count)
        assert len(some) == count
        places = [index * len(whole) // count for index in range(count)]
        assert all(torch.equal(some[n]["input_ids"], whole[at]) for n, at in enumerate(places))
    for count in (len(whole) + 1, None):
        assert len(spread(TokenWindows(file, 16), count)) == len(whole)


def test_a_file_knows_its_tokens(file):
    """So that runs on other text are told apart."""
    assert file.digest == hashlib.sha256(file.tokens_N.tobytes()).hexdigest()[:16]


def test_too_little_text_is_told(file):
    with pytest.raises(DataError, match=r"data\.max_length = 100000 are needed at least"):
        TokenWindows(file, 100_000)


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Huge:
        eos_token_id = 70_000

        def __len__(self):
            return 70_001

        def __call__(self, batch, **settings):
            return {"input_ids": [[69_999] for _ in batch]}

    file = tokenise(lambda: ["a", "b"], Huge(), tmp_path / "huge", None, lambda line: None)
    assert file.tokens_N.tolist() == [69_999, 70_000] * 2
