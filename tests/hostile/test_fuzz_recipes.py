"""Recipes that nobody would write: refused with a message, in good time, and nothing is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

import huggingface_hub
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import cases
from tests.training import tiny
from velora_torch.training.assets import AssetError
from velora_torch.training.data import DataError, check_sources
from velora_torch.training.folder import FolderError
from velora_torch.training.models import ModelError, check_settings
from velora_torch.training.output import check_output
from velora_torch.training.recipe import RecipeError, _known_keys, load_recipe, recipe_to_yaml

REFUSALS = (RecipeError, DataError, ModelError, AssetError, FolderError)
KEYS = list(_known_keys())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model and data, which is the current one; the hub does not answer."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny.save_model(folder / "model")
    tiny.save_rows(folder / "rows.jsonl")

    def away(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(huggingface_hub.HfApi, "model_info", away)
        patch.setattr(huggingface_hub.HfApi, "dataset_info", away)
        yield folder


def base() -> dict[str, Any]:
    return tiny.recipe_dict(Path("model"), Path("rows.jsonl"), Path("run"))


def put(recipe: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        below = recipe.get(section)
        recipe[section] = recipe = dict(below) if isinstance(below, dict) else {}
    recipe[name] = value


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A recipe with other values at some keys, and unknown keys."""
    recipe = copy.deepcopy(base())
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(KEYS) if draw(st.integers(0, 9)) else cases.texts)
        put(recipe, key, draw(cases.values))
    if draw(st.booleans()):
        return json.dumps(recipe).encode()  # JSON is YAML, with escapes of its own
    return yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "surrogatepass")


HOSTILE = [
    "a: &a [x, x]\n"
    + "\n".join(
        f"k{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *{'a' if not i else f'b{i - 1}'}]"
        for i in range(40)
    ),
    "data: {train: " + cases.nested(60, "[", "]") + "}",
    "data: {train: " + cases.nested(60, "{a: ", "}") + "}",
    cases.nested(60, "[", "]"),
    "- " * 60 + "x",
    "&x {data: *x}",
    "data: &x {train: rows.jsonl, columns: *x}",
    "<<: &x {<<: *x}",
    "<<: {data: {train: rows.jsonl}}",
    "<<: [1, 2]",
    "<<: 3",
    "!!python/object/apply:os.system ['touch executed']",
    "model: !!python/object/apply:os.system ['touch executed']",
    "model: !!python/name:os.system",
    "data: !!python/object/new:os.system {}",
    "model: !!binary aGVsbG8=\ndata: {train: rows.jsonl}",
    "data: !!set {a, b}",
    "data: {train: !!timestamp 2001-01-01, seed: 2001-99-99}",
    "data: {train: rows.jsonl, seed: 1:2:3}",
    "data: {train: rows.jsonl, seed: 0x" + "f" * 5000 + "}",
    "data: {train: rows.jsonl, seed: " + "9" * 5000 + "}",
    "data: {train: rows.jsonl, seed: 0b12}",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "%YAML 9.9\n---\ndata: {train: rows.jsonl}",
    "--- a\n--- b",
    "data: {train: rows.jsonl}\x00",
    'data: {train: "rows\\0.jsonl"}',
    'model: "\\ud800"\ndata: {train: rows.jsonl}',
    "\ufeff\ufeffdata: {train: rows.jsonl}",
    'data: {train: rows.jsonl}\ntrain: {output: "a\\0b"}',
    "data: {train: rows.jsonl}\ntrain: {output: /}",
    "data: {train: rows.jsonl}\ntrain: {output: .}",
    "data: {train: rows.jsonl}\ntrain: {output: rows.jsonl/x}",
    "data: {train: rows.jsonl}\ntrain: {output: " + "o" * 5000 + "}",
    "data: {train: rows.jsonl}\ntrain: {learning_rate: 1e400}",
    "data: {train: rows.jsonl}\ntrain: {learning_rate: 1" + "0" * 400 + "}",
    "data: {train: rows.jsonl}\ntrain: {learning_rate: .nan}",
    "data: {train: rows.jsonl}\nmemory_budget: 9" + "9" * 400 + "GiB",
    "data: {train: rows.jsonl}\nmemory_budget: 9" + "9" * 400,
    "data: {train: rows.jsonl}\ntask: pretrain\ntrain: {tokens: 9" + "9" * 400 + "B}",
    "data: {train: rows.jsonl}\ntask: pretrain\ntrain: {tokens: 9" + "9" * 400 + "}",
    "data: {train: rows.jsonl}\nvelora: {seed: 9" + "9" * 400 + "}",
    "data: {train: rows.jsonl}\nvelora: {num_groups: 9" + "9" * 400 + "}",
]


DEEP = {
    "lists": "data: {train: " + cases.nested(400, "[", "]") + "}",
    "sections": "data: {train: " + cases.nested(3000, "{a: ", "}") + "}",
    "items": "data: " + "- " * 100_000,
    "bytes": "# " + "x" * 2**20,
}


def damaged_text() -> st.SearchStrategy[bytes]:
    return st.sampled_from([yaml.safe_dump(base()), *HOSTILE]).flatmap(
        lambda text: cases.damaged(text[:4000].encode("utf-8", "surrogatepass"))
    )


@st.composite
def override(draw: st.DrawFn) -> str:
    key = draw(st.one_of(st.sampled_from(KEYS), cases.texts))
    value = draw(
        st.one_of(cases.texts, cases.values.map(lambda v: json.dumps(v)), st.sampled_from(HOSTILE))
    )
    return f"{key}{draw(st.sampled_from(['=', '=', '=', '', '==', '.=']))}{value}"


contents = st.one_of(changed(), damaged_text(), st.just(yaml.safe_dump(base()).encode()))


def check(place: Path, content: bytes, overrides: list[str]) -> None:
    """What `velora train --dry-run` does: it accepts, or refuses with one of its own errors."""
    path = place / "recipe.yaml"
    path.write_bytes(content)
    before = cases.tree(place)
    refusal = "none"
    with cases.watchdog():
        try:
            recipe = load_recipe(path, overrides)
            (place / "whole.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")
            again = load_recipe(place / "whole.yaml")
            (place / "whole.yaml").unlink()
            check_output(recipe.train.output, resume=False)
            check_settings(recipe)
            check_sources(recipe)
            recipe.describe().encode()
            assert again == recipe
        except REFUSALS as error:
            refusal = str(error)
    (place / "whole.yaml").unlink(missing_ok=True)
    assert refusal.strip()
    assert cases.tree(place) == before


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_recipes(place: Path, text: str) -> None:
    check(place, text.encode("utf-8", "surrogatepass"), [])
    check(place, yaml.safe_dump(base()).encode(), [f"model={text}"])


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP.keys())
def test_recipes_that_are_too_deep_or_too_large(place: Path, text: str) -> None:
    check(place, text.encode(), [])


@cases.fuzz
@given(content=contents, overrides=st.lists(override(), max_size=2))
def test_any_recipe_is_accepted_or_refused(
    place: Path, content: bytes, overrides: list[str]
) -> None:
    check(place, content, overrides)
