"""Data files of any content: their rows are learnt from, or an error names the file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import transformers
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import cases
from tests.training import tiny
from velora_torch.training.data import DataError, prepare
from velora_torch.training.pretraining.corpus import documents
from velora_torch.training.recipe import Recipe

NAMES = ["instruction", "input", "output", "text", "messages", "label", "text_pair"]
TASKS = ["language-modeling", "text-classification", "text-regression", "pretrain"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.save_model(tmp_path_factory.mktemp("tiny"))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.one_of(st.sampled_from(["user", "assistant", "system"]), cases.values),
            "content": st.one_of(cases.texts, cases.values),
        }
    ),
    max_size=3,
)
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {name: st.sampled_from(tiny.WORDS) for name in NAMES}
SENSIBLE |= {
    "messages": messages,
    "label": st.one_of(st.integers(0, 2), st.floats(0, 1), st.sampled_from(["yes", "no"])),
}


@st.composite
def rows(draw: st.DrawFn) -> list[Any]:
    """Rows with the same columns, most of their values of the right kind."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    found: list[Any] = []
    for _ in range(draw(st.integers(1, 5))):
        row = {n: draw(SENSIBLE[n] if draw(st.integers(0, 5)) else cases.values) for n in names}
        if draw(st.integers(0, 9)) == 0:
            row.pop(draw(st.sampled_from(names)))
            row[draw(cases.texts)] = draw(cases.values)
        found.append(row if draw(st.integers(0, 19)) else draw(cases.values))
    return found


def as_csv(found: list[Any]) -> str:
    """Rows as CSV, with what is no object left out."""
    file = io.StringIO()
    objects = [row for row in found if isinstance(row, dict)]
    writer = csv.DictWriter(file, list(objects[0]) if objects else ["a"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(objects)
    return file.getvalue()


WRITERS = {
    ".jsonl": lambda found: "\n".join(json.dumps(row) for row in found),
    ".json": json.dumps,
    ".csv": as_csv,
    ".txt": lambda found: "\n\n".join(map(str, found)),
}
SPECIAL = [
    b'{"text": "\xff\xfe"}',
    b'\xff\xfe{\x00"\x00',
    b'{"text": "\\ud800"}',
    b'{"text": "\\udc00\\ud800"}',
    b'{"text": "\\ud83d\\ude00 yes"}',
    b'{"text": "' + b"yes " * 50_000 + b'"}',
    b'{"text": ' + b"9" * 5000 + b"}",
    b'{"text": 1e400}',
    b'{"text": NaN}',
    b'{"text": "a\x00b"}',
    b'{"text": "a\\u0000b"}',
    b'{"a": ' * 2000 + b"1" + b"}" * 2000,
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"[" * 100_000,
    b'{"text": "x"}\r{"text": "y"}',
    b'{"text": "a", "text": "b"}',
    b"\xef\xbb\xbf\xef\xbb\xbf{}",
    b"{}",
    b"[]",
    b"null",
    b"\x1c",
    b'a,"b\n',
    b"a,b\n" + b"x" * 200_000 + b",y\n",
]


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A kind of file and its content."""
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".jsonl", *WRITERS]))
    if draw(st.integers(0, 9)) == 0:
        return suffix, draw(cases.damaged(draw(st.sampled_from(SPECIAL))[:3000]))
    content = WRITERS[suffix](draw(rows())).encode("utf-8", "surrogatepass")  # type: ignore[operator]
    return suffix, content if draw(st.booleans()) else draw(cases.damaged(content))


def check(
    folder: Path, suffix: str, content: bytes, task: str, tokenizer: Any, **data: Any
) -> None:
    """Rows are prepared, or refused with an error that names the file."""
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    settings = {"template": "plain", "too_long": "truncate", "max_length": 32, **data}
    recipe = Recipe.model_validate({"task": task, "data": {"train": str(path), **settings}})
    refusal = ""
    with cases.watchdog():
        try:
            if task == "pretrain":
                for document in documents(recipe.data, "train"):
                    assert document.encode()
            else:
                prepared = prepare(recipe, tokenizer)
                assert len(prepared.train)
                assert prepared.collator is None or prepared.collator([dict(prepared.train[0])])
        except DataError as error:
            refusal = str(error)
    assert not refusal or path.name in refusal or "data." in refusal
    assert cases.tree(folder) == {path.name}
    path.unlink()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("content", SPECIAL, ids=range(len(SPECIAL)))
def test_special_files(
    folder: Path, tokenizer: Any, suffix: str, content: bytes, task: str
) -> None:
    check(folder, suffix, content, task, tokenizer)


@cases.fuzz
@given(file=files(), task=st.sampled_from(["language-modeling", *TASKS]), packing=st.booleans())
def test_any_data_is_prepared_or_refused(
    folder: Path, tokenizer: Any, file: tuple[str, bytes], task: str, packing: bool
) -> None:
    more = {"packing": packing} if task == "language-modeling" else {}
    check(folder, *file, task, tokenizer, **more)
