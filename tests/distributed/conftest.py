"""What the tests of `velora train` in several processes share."""

from __future__ import annotations

import os

import pytest

from tests.distributed.runs import final, go, overrides
from tests.training import tiny
from tests.training.pretraining import texts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    former = os.environ.get("VELORA_CACHE")
    os.environ["VELORA_CACHE"] = str(folder / "cache")
    corpus = texts.save_jsonl(folder / "corpus.jsonl", texts.documents())
    written = texts.recipe_dict(
        texts.save_config(folder / "small.json"),
        corpus,
        folder / "run",
        velora={"sub_token_size": 4, "refresh_every": 3},
    )
    tiny.save_recipe(folder / "recipe.yaml", written)
    yield folder
    del os.environ["VELORA_CACHE"]
    if former is not None:
        os.environ["VELORA_CACHE"] = former


@pytest.fixture(scope="module")
def alone(place):
    """One process with all examples of a step."""
    losses, _, sharded = go(place / "recipe.yaml", "ddp", overrides(place, "alone", batch_size=8))
    assert not sharded
    return losses, final(place / "alone")
