"""`velora analyze` from end to end on tiny recipes."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pydantic")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from tests.training import tiny, tiny_tasks
from velora_torch import cli
from velora_torch.analysis import plots
from velora_torch.analysis.results import read_analysis, write_analysis
from velora_torch.analysis.run import AnalysisError, Request, analyze, numbers
from velora_torch.training.recipe import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

FILES = {"analysis.json", "analysis.md"} | {
    f"{name}.{suffix}"
    for name in ("stable_rank", "similarity", "layers", "cosine")
    for suffix in ("png", "svg")
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe of a tiny LLaMA, its analysis, and the folder it was written to."""
    folder = tmp_path_factory.mktemp("analysis")
    model, rows = tiny.save_model(folder / "model"), tiny.save_rows(folder / "rows.jsonl")
    written = tiny.recipe_dict(
        model,
        rows,
        folder / "run",
        dtype="float32",
        train={"accumulation": 2, "gradient_checkpointing": True, "chunked_loss": True},
    )
    recipe = load_recipe(tiny.save_recipe(folder / "recipe.yaml", written))
    said = []
    request = Request(folder / "out", (0, 2), (8, 100), 24, "velora analyze recipe.yaml")
    return recipe, analyze(recipe, request, said.append), folder, "\n".join(said)


def test_everything_is_written_and_reads_back(made):
    recipe, analysis, folder, said = made
    assert {path.name for path in (folder / "out").iterdir()} == FILES
    assert not (folder / "run").exists()  # nothing of the training is left
    assert recipe.velora is not None  # the caller's recipe is as it was
    assert read_analysis(folder / "out/analysis.json") == analysis
    assert "14 layers, up to 24 tokens of each at steps 0, 2" in said
    assert "step 2: 14 layers measured" in said
    assert "skipped: 100 groups in q_proj" in said
    summary = (folder / "out/analysis.md").read_text()
    for heading in ("## Choices of v: 8 groups, step 2", "## Cosine over training", "## Left out"):
        assert heading in summary
    assert "](cosine.png)" in summary
    assert "<svg" in (folder / "out/similarity.svg").read_text()


def test_every_layer_step_choice_and_number_of_groups_has_its_row(made):
    _, analysis, _, _ = made
    assert len(analysis.layers) == 14
    assert len(analysis.samples) == 2 * 14
    assert {sample.sampled for sample in analysis.samples} == {24}
    assert len(analysis.ranks) == 2 * (12 + 2 * 2)  # only down_proj has 100 features
    assert len(analysis.projections) == 12 * len(analysis.ranks)
    assert len(analysis.curves) == 2 * 2 * 12
    places = {(p.step, p.layer, p.groups, p.init, p.vectors) for p in analysis.projections}
    assert len(places) == len(analysis.projections)


def test_the_numbers_agree_with_each_other(made):
    _, analysis, _, _ = made
    for row in analysis.projections:
        assert 0 <= row.energy_lowest <= row.energy <= row.energy_highest <= 1
        assert row.relative_error == pytest.approx(math.sqrt(1 - row.cosine**2), abs=1e-3)
        assert 0 <= row.sparsity <= 1
        assert 1 <= row.stable_rank <= row.groups
        assert 0 <= row.spread <= math.pi / 2
    ranks = {(rank.step, rank.layer, rank.groups): rank for rank in analysis.ranks}
    best = [row for row in analysis.projections if (row.step, row.init) == (0, "svd")]
    for row in best:
        rank = ranks[0, row.layer, row.groups]
        assert 1 <= rank.per_group <= rank.size
        if row.vectors == "shared":  # the best vector's energy is the inverse of the stable rank
            assert row.energy == pytest.approx(1 / rank.shared, rel=1e-4)


def test_in_the_first_step_all_averages_are_one(made):
    _, analysis, _, _ = made
    first = [row for row in analysis.projections if row.step == 0 and row.vectors == "shared"]
    for init in ("running_average", "batch_average"):
        moving = [dataclasses.replace(row, init="") for row in first if row.init == init]
        fixed = [dataclasses.replace(row, init="") for row in first if row.init == "average"]
        assert moving == fixed
    later = [row for row in analysis.projections if row.step == 2]
    fixed = [row.energy for row in later if row.init == "average"]
    assert fixed != [row.energy for row in later if row.init == "batch_average"]


def test_it_trains_between_its_steps(made):
    _, analysis, _, _ = made
    first, later = (
        [row.shared for row in analysis.ranks if row.step == step and row.groups == 8]
        for step in (0, 2)
    )
    assert all(a != b for a, b in zip(first, later, strict=True))


def test_a_picture_model_and_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw_all", lambda analysis, folder: [])
    model, data = tiny_tasks.save_vit(tmp_path / "vit"), tiny_tasks.save_pictures(tmp_path / "data")
    written = tiny_tasks.recipe_dict("image-classification", model, data, tmp_path / "run")
    recipe = load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written))
    analysis = analyze(recipe, Request(tmp_path / "out", (3,), (4, 8)), lambda line: None)
    assert {sample.step for sample in analysis.samples} == {3}
    assert {row.init for row in analysis.projections} >= {"running_average", "svd"}
    summary = (tmp_path / "out/analysis.md").read_text()
    assert "## Cosine over training" not in summary
    assert "## Left out" not in summary


# ------------------------------------------------------------------ JSON


def test_numbers_that_are_not_defined_are_null(made, tmp_path):
    _, analysis, _, _ = made
    row = dataclasses.replace(analysis.projections[0], cosine=math.nan)
    write_analysis(dataclasses.replace(analysis, projections=[row]), tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text)["schema"] == "velora-torch/analysis/1"
    assert json.loads(text)["projections"][0]["cosine"] is None
    assert math.isnan(read_analysis(tmp_path / "a.json").projections[0].cosine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a whole JSON file"),
        ("[]", "not an analysis of velora-torch"),
        ('{"schema": "velora-torch/results/1"}', "only 'velora-torch/analysis/1' can be read"),
        ('{"schema": "velora-torch/analysis/1", "stepz": []}', "stepz: not a field"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_analysis(tmp_path / "a.json")


# ------------------------------------------------------------------ mistakes


def test_numbers_with_commas():
    assert numbers("0, 50", "steps") == (0, 50)
    with pytest.raises(AnalysisError, match="--steps '0;50': expected whole numbers"):
        numbers("0;50", "steps")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    model, rows = tmp_path / "no-model", tiny.save_rows(tmp_path / "rows.jsonl")
    recipe = tiny.save_recipe(
        tmp_path / "recipe.yaml", tiny.recipe_dict(model, rows, tmp_path / "run")
    )

    def _run(*more):
        monkeypatch.setattr("sys.argv", ["velora", "analyze", str(recipe), *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    return _run


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "0,0"), "--steps 0,0: the numbers must rise"),
        (("--steps", "5,2"), "--steps 5,2: the numbers must rise"),
        (("--steps", "-1"), "--steps -1: numbers from 0 on are needed"),
        (("--steps", ""), "--steps '': expected whole numbers"),
        (("--steps", "0,6"), "the recipe trains 6 steps, so the last"),
        (("--groups", "0,4"), "--groups 0,4: numbers from 1 on are needed"),
        (("--groups", "8,4"), "--groups 8,4: the numbers must rise"),
        (("--tokens", "1"), "--tokens must be at least 2, not 1"),
        (("train.stepz=3",), "stepz"),
        (("method=coefficients",), "set method=full"),
        ((), "no-model"),
    ],
)
def test_mistakes_are_messages_before_any_work(command, tmp_path, more, message):
    code, errors = command("--output", str(tmp_path / "out"), *more)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    code, errors = command("--output", str(tmp_path / "out"))
    assert code == 2
    assert "is there already; choose another with --output" in errors
    assert (tmp_path / "out/mine.txt").read_text() == "keep"


def test_an_output_that_cannot_be_made_is_refused(command, tmp_path):
    code, errors = command("--output", str(tmp_path / "rows.jsonl/deep/out"))
    assert code == 2
    assert "rows.jsonl/deep/out: nothing can be written into" in errors


def test_an_output_must_be_writable_itself(monkeypatch, tmp_path):
    """Its parent need not be: a mounted folder is often all that may be written into."""
    (tmp_path / "closed/own").mkdir(parents=True)
    (tmp_path / "open/closed").mkdir(parents=True)
    closed = {tmp_path / "closed", tmp_path / "open/closed"}
    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed)
    recipe = load_recipe(
        tiny.save_recipe(tmp_path / "r.yaml", tiny.recipe_dict("no-model", "r.jsonl", "run"))
    )
    Request(tmp_path / "closed/own").check(recipe)
    with pytest.raises(AnalysisError, match=r"nothing can be written into .*open/closed"):
        Request(tmp_path / "open/closed").check(recipe)


def test_gradients_that_are_zero_are_said(tmp_path):
    """Those of LoRA's A before the first update."""
    pytest.importorskip("peft")
    model, rows = tiny.save_model(tmp_path / "model"), tiny.save_rows(tmp_path / "rows.jsonl")
    written = tiny.recipe_dict(model, rows, tmp_path / "run", dtype="float32", method="lora")
    recipe = load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written))
    said = []
    analysis = analyze(recipe, Request(tmp_path / "out", (0, 1), (4,), 16), said.append)
    line = "At step 0 the gradients of 14 of 14 layers are zero"
    assert sum(line in each for each in said) == 1
    assert line in (tmp_path / "out/analysis.md").read_text()
    assert not any("At step 1" in each for each in said)
    defined = {(p.step, math.isfinite(p.cosine)) for p in analysis.projections}
    assert defined == {(0, False), (1, True)}
    assert {(s.step, math.isfinite(s.sparsity)) for s in analysis.samples} == defined


def test_more_steps_than_the_epochs_have(tmp_path):
    model, rows = tiny.save_model(tmp_path / "model"), tiny.save_rows(tmp_path / "rows.jsonl")
    written = tiny.recipe_dict(model, rows, tmp_path / "run", train={"epochs": 1})
    del written["train"]["steps"]
    recipe = load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written))
    with pytest.raises(AnalysisError, match="--steps 50: the recipe trains 4 steps"):
        analyze(recipe, Request(tmp_path / "out", (0, 50)), lambda line: None)
    assert not (tmp_path / "out").exists()
