"""Checkpoints of a run: damage is found before training, and nothing is lost to a full disk."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training import tiny
from tests.training.test_manifest import flip
from tests.training.test_run import go
from velora_torch import lock
from velora_torch.training import manifest
from velora_torch.training.exporting import export_run
from velora_torch.training.folder import FolderError, RunFolder
from velora_torch.training.recipe import load_recipe
from velora_torch.training.staging import STAGING, SavingError, checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
QUIET = {"before": False, "after": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model", torch.float32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def recipe(model, rows, tmp_path):
    def _make(output="run", **sections):
        written = tiny.recipe_dict(
            model, rows, tmp_path / output, dtype="float32", evaluate=QUIET, **sections
        )
        return load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written))

    return _make


@pytest.fixture(scope="module")
def finished(model, rows, tmp_path_factory):
    """A finished run with checkpoints 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    written = tiny.recipe_dict(model, rows, folder / "run", dtype="float32", evaluate=QUIET)
    go(load_recipe(tiny.save_recipe(folder / "recipe.yaml", written)))
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def weights(run):
    return load_file(run / "final" / "model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_is_whole_and_its_manifest_knows_every_file(finished):
    for path in checkpoints(finished):
        assert manifest.damage(path) is None
        files = {p.name for p in path.iterdir()} - {manifest.MANIFEST}
        known = json.loads((path / manifest.MANIFEST).read_bytes())["files"]
        assert files == known.keys()
        assert {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} <= files
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoint-4",
        "checkpoint-6",
        "final",
        "recipe.yaml",
        "report.html",
        "results.json",
    }


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        "velora_state.json",
        "velora_state-*.safetensors",
        "config.json",
    ],
)
@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_damage_is_found_and_the_checkpoint_before_is_used(copy, name, kind):
    (path,) = (copy / "checkpoint-6").glob(name)
    if kind == "flipped":
        flip(path, path.stat().st_size // 2)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    lines: list[str] = []
    found = RunFolder(copy).check(resume=True, overwrite=False, say=lines.append)
    assert found == copy / "checkpoint-4"
    assert "checkpoint-6 can't be used" in lines[0]
    assert path.name in lines[0]
    assert "using checkpoint-4, which is whole" in lines[0]


def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_bits(recipe, copy, finished):
    flip(copy / "checkpoint-6" / "optimizer.pt", 999)
    (copy / "final" / "model.safetensors").unlink()
    results = go(recipe(), resume=True)
    assert [point.step for point in results.history] == [1, 2, 3, 4, 5, 6]
    assert same(weights(copy), weights(finished))
    assert manifest.damage(copy / "checkpoint-6") is None


def test_without_a_whole_checkpoint_nothing_is_loaded(recipe, copy, monkeypatch):
    for path in checkpoints(copy):
        flip(path / "rng_state.pth", 100)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(FolderError, match=r"checkpoint-4 can't be used: rng_state\.pth"):
        go(recipe(), resume=True)
    shutil.rmtree(copy / "final")
    with pytest.raises(FolderError, match="no complete checkpoint"):
        export_run(copy, copy.parent / "plain", lora=False)


@pytest.fixture
def file_limit():
    """Let files be at most so large, as on a disk that is full."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("too_large", ["model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_full_disk_is_said_and_leaves_the_former_checkpoint(
    recipe, copy, finished, file_limit, too_large
):
    sizes = {path.name: path.stat().st_size for path in (finished / "checkpoint-6").iterdir()}
    shutil.rmtree(copy / "checkpoint-6")
    kept = {path: path.read_bytes() for path in (copy / "checkpoint-4").iterdir()}
    if sizes[too_large] < max(sizes["model.safetensors"], 10**5):  # a small one: only it fails
        real = torch.save

        def save(value, path, *rest, **more):
            if Path(path).name == too_large:
                file_limit(100)
            real(value, path, *rest, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", save)
            with pytest.raises(SavingError) as caught:
                go(recipe(), resume=True)
    else:
        file_limit(sizes[too_large] - 1)
        with pytest.raises(SavingError) as caught:
            go(recipe(), resume=True)
    message = str(caught.value)
    assert "the checkpoint of step 6 can't be written into" in message
    assert f"{copy / 'checkpoint-4'} is untouched: go on from it with --resume" in message
    assert not (copy / STAGING).exists()
    assert {path: path.read_bytes() for path in (copy / "checkpoint-4").iterdir()} == kept


def test_a_full_disk_at_the_end_leaves_the_checkpoint(recipe, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("velora_torch.training.saving._write", full)
    with pytest.raises(SavingError, match="the trained model can't be written"):
        go(recipe(train={"keep": 1, "save_every": 3}))
    assert not (tmp_path / "run/final").exists()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    monkeypatch.undo()
    go(recipe(), resume=True)
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_two_runs_do_not_share_a_folder(recipe, copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    with lock.alone(copy, "velora train", "train.output=..."):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match="another `velora train`"):
                go(recipe(), **options)
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that nobody can write")
@pytest.mark.parametrize("output", ["/proc/run", "recipe.yaml", "recipe.yaml/run"])
def test_what_cannot_be_written_is_said_before_any_work(recipe, tmp_path, output):
    made = recipe(output)
    lines: list[str] = []
    with pytest.raises(FolderError, match=r"choose (another|a) folder with train\.output"):
        go(made, lines.append)
    assert lines == []


def test_what_a_killed_run_was_writing_is_removed(recipe, copy, finished):
    (copy / STAGING / "checkpoint-7").mkdir(parents=True)
    (copy / STAGING / "final").mkdir()
    (copy / ".results.json.123.tmp").write_text("{")
    go(recipe(), resume=True)
    assert {p.name for p in copy.iterdir()} == {p.name for p in finished.iterdir()}


def test_a_run_that_was_killed_after_its_last_step_only_writes_its_model(recipe, copy, finished):
    shutil.rmtree(copy / "final")
    results = go(recipe(), resume=True)
    assert results.run.status == "finished"
    assert [point.step for point in results.history] == [1, 2, 3, 4, 5, 6]
    assert same(weights(copy), weights(finished))


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "3", "--steps", "8", "--no-row"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["kills"] == 3
    assert row["bitwise_equal"]
