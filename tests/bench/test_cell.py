"""One real cell on a tiny model, and what becomes of a run's results."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("pydantic")

from tests.bench import fakes
from tests.training import tiny
from velora_torch.bench import command as command_room
from velora_torch.bench.cell import recipe_of, row_of, run_cell
from velora_torch.bench.command import bench
from velora_torch.bench.grid import Bench, Scale, cells, row_to_json
from velora_torch.bench.lm_evaluation import mmlu, model_arguments
from velora_torch.bench.request import Request
from velora_torch.report.results import HistoryPoint, ModelInfo, Quality, Results, RunInfo
from velora_torch.training.recipe import Recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::velora_torch.memory.freed.TargetWarning"),
]


def results(after=None, history=()):
    return Results(
        RunInfo("x", "finished", seconds=1.0), ModelInfo("m", 10, 5), list(history), after=after
    )


@pytest.fixture
def cell():
    return cells(fakes.make_bench(), "local", ["a"], ["full+velora"], 1)[0]


def test_scores_of_the_run_or_those_measured_afterwards(cell):
    after = Quality(accuracy=0.7, metric="f1", scores={"accuracy": 0.7, "f1": 0.6})
    assert (row_of(cell, results(after), "").metric, row_of(cell, results(after), "").score) == (
        "f1",
        0.6,
    )
    row = row_of(cell, results(after), "", {"mmlu": 0.4, "humanities": 0.3})
    assert (row.metric, row.score, row.scores["humanities"]) == ("mmlu", 0.4, 0.3)
    assert row_of(cell, results(None), "", {"mmlu": 0.4}).score == 0.4


@pytest.mark.parametrize(
    "after",
    [None, Quality(loss=1.0), Quality(accuracy=float("nan"))],
    ids=["not evaluated", "loss alone", "nan"],
)
def test_a_run_without_a_score_is_a_failure(cell, after):
    history = [HistoryPoint(1, float("nan"))]
    with pytest.raises(ValueError, match="last training loss: nan"):
        row_of(cell, results(after, history), "")


def test_numbers_that_json_lacks_are_left_out(cell):
    after = Quality(accuracy=0.5, loss=float("inf"), perplexity=float("nan"))
    row = row_of(cell, results(after), "")
    assert (row.loss, row.perplexity) == (None, None)
    json.dumps(row_to_json(row), allow_nan=False)


def test_an_interrupted_run_is_no_result(cell, monkeypatch, tmp_path):
    from velora_torch.training import run as run_room

    monkeypatch.setitem(command_room.BENCHES, "fake", fakes.make_bench())
    stopped = Results(RunInfo("x", "interrupted"), ModelInfo("m", 10, 5))
    monkeypatch.setattr(run_room, "run", lambda recipe, options, say: stopped)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, "", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tiny_bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, rows = tiny.save_model(folder / "model"), tiny.save_rows(folder / "rows.jsonl")

    def recipe(task, variant, seed):
        made = tiny.recipe_dict(model, rows, folder / "unused")
        made["data"] |= {"eval_fraction": 0.25, "seed": seed}
        made["train"] |= {"seed": seed, "save_final": False, "save_every": None}
        if variant != "full+velora":
            made["velora"] = None
        return made | {"evaluate": {"metric": "choice", "before": False}}

    return Bench("tiny", "Tiny", fakes.VARIANTS[:2], {"local": Scale(("rows",), recipe, "rows")})


def test_a_real_bench_from_training_to_table(tiny_bench, monkeypatch, tmp_path):
    monkeypatch.setitem(command_room.BENCHES, "tiny", tiny_bench)
    said = []
    request = Request("tiny", tmp_path, seeds=2, command="velora bench tiny")
    assert bench(request, said.append) == 0, "\n".join(said)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 4
    plain, velora = (json.loads(line) for line in lines[:2])
    assert set(plain["memory"]) == {
        "weights",
        "saved_activations",
        "gradients",
        "optimizer_state",
        "total",
    }
    assert velora["memory"]["gradients"] < plain["memory"]["gradients"]
    assert velora["memory"]["saved_activations"] < plain["memory"]["saved_activations"]
    assert velora["trainable_parameters"] == plain["trainable_parameters"] > 0
    assert plain["recipe"]["train"]["steps"] == 6
    assert plain["versions"]["torch"]
    assert plain["machine"]["cores"]
    assert 0 <= plain["score"] <= 1
    assert plain["train_seconds"] < plain["seconds"]
    times = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert [t["variant"] for t in times] == ["full", "full+velora"]
    assert all(t["low"] <= t["median"] <= t["high"] and t["rounds"] >= 5 for t in times)
    assert "| Full + VeLoRA | Full |" in (tmp_path / "table.md").read_text()
    assert not list(tmp_path.glob(".scratch*"))


# ------------------------------------------------------------------ MMLU


def test_mmlu_without_lm_eval_names_the_command(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install lm-eval"):
        mmlu(Recipe.model_validate(fakes.recipe("a", "full", 0)))


def test_what_lm_eval_loads(tmp_path):
    from velora_torch.bench.alpaca import paper_recipe

    final = tmp_path / "final"
    final.mkdir()

    def arguments(variant):
        made = paper_recipe("7b", variant, 0)
        made["train"]["output"] = str(tmp_path)
        return model_arguments(Recipe.model_validate(made))

    assert arguments("full") == {"dtype": "bfloat16", "pretrained": str(final)}
    (final / "adapter_config.json").write_text("{}")
    adapters = {"dtype": "bfloat16", "pretrained": "huggyllama/llama-7b", "peft": str(final)}
    assert arguments("lora-bf16") == adapters
    assert arguments("qlora+velora") == {
        **adapters,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }


def test_a_cell_writes_where_it_is_told(cell):
    assert recipe_of(cell, "there").train.output == "there"
    assert recipe_of(cell, "there").velora == Recipe.model_validate(cell.recipe).velora
