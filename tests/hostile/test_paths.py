"""What a recipe or a checkpoint names stays where it belongs: links and dots lead nowhere."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from tests.training import tiny
from velora_torch.training.exporting import export_run
from velora_torch.training.recipe import load_recipe
from velora_torch.training.run import Options, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def go(model: Path, rows: Path, tmp_path: Path) -> Any:
    """Runs the tiny recipe with an output folder."""

    def start(output: str | Path, steps: int = 1, **options: bool) -> None:
        train = {"steps": steps, "save_every": 1, "keep": 1}
        evaluate = {"before": False, "after": False}
        recipe = tiny.recipe_dict(model, rows, Path("x"), train=train, evaluate=evaluate)
        recipe["train"]["output"] = str(output)
        file = tiny.save_recipe(tmp_path / "small.yaml", recipe)
        run(load_recipe(file), Options(**options), lambda line: None)

    return start


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is nobody's business."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    (folder / "thesis.tex").write_text("words")
    (folder / "deep/letter.txt").write_text("more words")
    return folder


def untouched(outside: Path) -> bool:
    return (outside / "thesis.tex").read_text() == "words" and (
        outside / "deep/letter.txt"
    ).read_text() == "more words"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_no_folder_of_a_run(
    go: Any, outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    monkeypatch.chdir(outside)
    (outside / "recipe.yaml").write_text("data: {train: trec}")  # as in the folder of a run
    root = set(os.listdir("/"))
    for output in (
        "/",
        ".",
        "..",
        str(outside),
        str(outside / "deep/.."),
        str(outside / "thesis.tex"),
        "thesis.tex/run",
    ):
        with pytest.raises((ValueError, OSError)) as refused:
            go(output, overwrite=overwrite)
        assert str(refused.value).strip()
    assert set(os.listdir("/")) == root
    assert untouched(outside)
    assert {path.name for path in outside.iterdir()} == {"thesis.tex", "deep", "recipe.yaml"}


@pytest.mark.parametrize("name", ["checkpoint-7", "final", "runs"])
def test_overwriting_a_run_follows_no_link_out_of_it(
    go: Any, outside: Path, tmp_path: Path, name: str
) -> None:
    go(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
    (tmp_path / "run" / name).symlink_to(outside, target_is_directory=True)
    with suppress(ValueError, OSError):  # to refuse it is as good
        go(tmp_path / "run", overwrite=True)
    assert untouched(outside)
    assert {path.name for path in outside.iterdir()} == {"thesis.tex", "deep"}


def test_links_inside_of_a_checkpoint_are_not_followed(
    go: Any, outside: Path, tmp_path: Path
) -> None:
    go(tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoint-1"
    (checkpoint / "link").symlink_to(outside, target_is_directory=True)
    go(tmp_path / "run", overwrite=True)
    assert untouched(outside)
    assert not (checkpoint / "link").exists()


def test_rotation_follows_no_link(go: Any, outside: Path, tmp_path: Path) -> None:
    """Old checkpoints that are links, or hold some, are not followed when they are removed."""
    go(tmp_path / "run")
    (tmp_path / "run/checkpoint-1/link").symlink_to(outside, target_is_directory=True)
    go(tmp_path / "run", steps=3, resume=True)
    assert (tmp_path / "run/checkpoint-3").is_dir()
    assert untouched(outside)


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "/etc/passwd", "a/../../stolen.safetensors"]
)
def test_a_shard_in_another_folder_is_refused(
    go: Any, model: Path, tmp_path: Path, name: str
) -> None:
    """A model, and a checkpoint, whose index names a file outside of it."""
    go(tmp_path / "run")
    for folder in (tmp_path / "run/checkpoint-1", tmp_path / "run/final"):
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors, folder.parent / "stolen.safetensors", {"format": "pt"})
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError)):
        go(tmp_path / "run", steps=2, resume=True)
    with pytest.raises((ValueError, OSError)):
        export_run(tmp_path / "run", tmp_path / "exported", lora=False)
    assert not (tmp_path / "exported").exists()


def test_a_model_with_a_shard_in_another_folder_is_refused(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "stolen.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../stolen.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    recipe = tiny.recipe_dict(folder, rows, tmp_path / "run")
    with pytest.raises(ValueError, match=r"stolen\.safetensors"):
        run(
            load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", recipe)),
            Options(),
            lambda line: None,
        )
    assert not (tmp_path / "run").exists()


def test_an_exported_link_is_not_its_target(go: Any, outside: Path, tmp_path: Path) -> None:
    """A checkpoint that is passed around may link to files of whoever exports it."""
    go(tmp_path / "run")
    (tmp_path / "run/final/notes.txt").symlink_to(outside / "thesis.tex")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        export_run(tmp_path / "run", tmp_path / "exported", lora=False)
    assert not (tmp_path / "exported").exists()
