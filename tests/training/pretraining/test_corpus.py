"""Where text comes from, and which documents are held out."""

from __future__ import annotations

import gzip
import json

import pytest

from tests.training.pretraining import texts
from velora_torch.training.packaged import manuals
from velora_torch.training.pretraining import corpus as corpus_module
from velora_torch.training.pretraining.corpus import check_corpus, documents, identity
from velora_torch.training.sections import DataSection
from velora_torch.training.sources import DataError

DOCUMENTS = texts.documents()


def read(path, side="train", **more):
    return list(documents(DataSection(train=str(path), **more), side))


@pytest.fixture
def corpus(tmp_path):
    return texts.save_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)


def test_every_document_is_on_one_side(corpus):
    train, held = read(corpus), read(corpus, "eval")
    assert sorted(train + held) == sorted(DOCUMENTS)
    assert 0 < len(held) < len(DOCUMENTS) / 3


def test_the_split_depends_on_the_text_and_the_seed_alone(corpus, tmp_path):
    shuffled = texts.save_jsonl(tmp_path / "other.jsonl", DOCUMENTS[::-1])
    assert set(read(corpus, "eval")) == set(read(shuffled, "eval"))
    assert set(read(corpus, "eval")) != set(read(corpus, "eval", seed=1))


def test_copies_of_a_document_stay_on_one_side(tmp_path):
    twice = texts.save_jsonl(tmp_path / "twice.jsonl", DOCUMENTS * 2)
    assert not set(read(twice)) & set(read(twice, "eval"))


def test_held_out_data_of_their_own(corpus, tmp_path):
    other = texts.save_jsonl(tmp_path / "held.jsonl", texts.documents(5, seed=1))
    assert read(corpus, eval=str(other)) == DOCUMENTS
    assert read(corpus, "eval", eval=str(other)) == texts.documents(5, seed=1)


def test_a_part_of_a_text_comes_from_everywhere(corpus, tmp_path):
    """And an added document moves no other."""
    mixed = read(corpus, shuffle=True)
    assert sorted(mixed) == sorted(read(corpus))
    ranks = [DOCUMENTS.index(text) for text in mixed[: len(mixed) // 3]]
    assert min(ranks) < len(DOCUMENTS) / 4
    assert max(ranks) > len(DOCUMENTS) * 3 / 4
    assert read(corpus, shuffle=True, seed=1, eval_fraction=0.0) != read(
        corpus, shuffle=True, eval_fraction=0.0
    )
    fewer = texts.save_jsonl(tmp_path / "fewer.jsonl", DOCUMENTS[:20] + DOCUMENTS[21:])
    assert read(fewer, shuffle=True) == [text for text in mixed if text != DOCUMENTS[20]]


def test_shuffled_text_has_the_same_documents_on_each_side(corpus):
    assert set(read(corpus, "eval", shuffle=True)) == set(read(corpus, "eval"))
    assert set(read(corpus, shuffle=True)) == set(read(corpus))


def test_a_long_text_is_shuffled_block_by_block(corpus, monkeypatch):
    monkeypatch.setattr(corpus_module, "BLOCK", 10 * len(DOCUMENTS[0]))
    mixed = read(corpus, shuffle=True, eval_fraction=0.0)
    assert sorted(mixed) == sorted(DOCUMENTS)
    assert mixed != DOCUMENTS
    moved = [abs(DOCUMENTS.index(text) - place) for place, text in enumerate(mixed)]
    assert max(moved) < 13
    assert mixed[:8] != DOCUMENTS[:8]


def test_an_order_is_part_of_what_a_corpus_is(corpus):
    data = DataSection(train=str(corpus))
    assert identity(data) != identity(data.model_copy(update={"shuffle": True}))


def test_limits_count_documents(corpus):
    assert read(corpus, max_train=7) == read(corpus)[:7]
    assert read(corpus, "eval", max_eval=2) == read(corpus, "eval")[:2]


def test_a_parquet_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "corpus.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": DOCUMENTS}), path)
    assert read(path, eval_fraction=0.0) == DOCUMENTS


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name, part in (("b", DOCUMENTS[:30]), ("a", DOCUMENTS[30:])):
        texts.save_jsonl(tmp_path / f"{name}.jsonl", part)
    (tmp_path / "notes.md").write_text("not data")
    assert read(tmp_path, eval_fraction=0.0) == DOCUMENTS[30:] + DOCUMENTS[:30]


def test_a_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    path = tmp_path / "book.txt"
    whole = "\n\n".join(DOCUMENTS * 3)
    path.write_text(whole, encoding="utf-8")
    parts = read(path, eval_fraction=0.0)
    assert len(parts) > 3
    assert "".join(parts) == whole
    assert all(len(part) < 10_000 for part in parts)


@pytest.mark.parametrize("between", ["\n", " "], ids=["no blank line", "one line"])
def test_a_text_without_blank_lines_is_cut_too(tmp_path, between):
    path = tmp_path / "text8.txt"
    whole = between.join(DOCUMENTS * 5)
    path.write_text(whole, encoding="utf-8")
    parts = read(path, eval_fraction=0.0)
    assert len(parts) > 3
    assert "".join(parts) == whole
    assert all(len(part) <= 3 * 8192 and part[-1] == between for part in parts[:-1])


def test_a_line_without_spaces_is_cut_anywhere(tmp_path):
    path = tmp_path / "genome.txt"
    path.write_text("acgt" * 20_000)
    parts = read(path, eval_fraction=0.0)
    assert "".join(parts) == "acgt" * 20_000
    assert 1 < len(parts) < 10


def test_the_column_can_be_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": 1, "body": text}) + "\n" for text in DOCUMENTS))
    assert read(path, columns={"text": "body"}, eval_fraction=0.0) == DOCUMENTS
    with pytest.raises(DataError, match=r"can't tell which column .*id, body.*data\.columns\.text"):
        read(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": 3}\n', "example 1: 'text' holds a int; expected text"),
        ('{"text": "a"}\n{"text"\n', r":2: not valid JSON"),
        ('{"text": "a"}\n[1]\n', r":2: expected an object"),
        ("", "no document is to train on"),
        ('{"text": "  "}\n', "no document is to train on"),
    ],
)
def test_bad_rows_are_named(tmp_path, lines, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=message):
        read(path, eval_fraction=0.0)


def test_broken_bytes_are_told(tmp_path):
    for name in ("rows.jsonl", "text.txt"):
        path = tmp_path / name
        path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
        with pytest.raises(DataError, match="is not UTF-8"):
            read(path, eval_fraction=0.0)


def test_nothing_held_out_is_told(corpus):
    with pytest.raises(DataError, match=r"held out; raise data\.eval_fraction"):
        read(corpus, "eval", eval_fraction=0.0)


def test_missing_sources_are_told(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file"):
        check_corpus(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="holds no file that can be read"):
        check_corpus(str(tmp_path))
    monkeypatch.setattr(
        manuals,
        "_MANUALS",
        {"python-docs": manuals._Manual("python3.11-doc", tmp_path / "none", "*")},
    )
    with pytest.raises(DataError, match=r"apt-get install python3\.11-doc"):
        check_corpus("python-docs")


def test_manuals_are_read_packed_and_without_translations(tmp_path, monkeypatch):
    (tmp_path / "translations").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "translations" / "it.rst").write_text("Ciao")
    (tmp_path / "sub" / "b.rst.gz").write_bytes(gzip.compress("Zweite Séite".encode()))
    (tmp_path / "a.rst").write_text("First")
    manual = manuals._Manual("linux-doc-6.1", tmp_path, "*.rst*", "translations")
    monkeypatch.setattr(manuals, "_MANUALS", {"linux-docs": manual})
    assert list(manuals.load_manuals("debian-docs")) == ["First", "Zweite Séite"]
    with pytest.raises(Exception, match=r"did you mean 'linux-docs'"):
        manuals.check_manuals("linux-doc")


def test_the_identity_changes_with_the_files(corpus):
    data = DataSection(train=str(corpus))
    before = identity(data)
    assert identity(data) == before
    assert identity(data.model_copy(update={"seed": 1})) != before
    texts.save_jsonl(corpus, DOCUMENTS[:-1])
    assert identity(data) != before
