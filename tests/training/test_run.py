"""`velora train` from end to end on a tiny model: what is written, resumed, exported, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.training import tiny
from velora_torch import checkpoint
from velora_torch.report.results import read_results
from velora_torch.training.exporting import export_run
from velora_torch.training.folder import FolderError
from velora_torch.training.recipe import load_recipe
from velora_torch.training.run import Options, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def recipe(model, rows, tmp_path):
    def _make(output="run", **sections):
        written = tiny.recipe_dict(model, rows, tmp_path / output, **sections)
        return load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written))

    return _make


def go(recipe, say=lambda line: None, **options):
    return run(recipe, Options(**options), say)


def interrupt_at(step):
    """Press Ctrl-C when the progress line of a step is shown."""

    def say(line):
        if line.startswith(f"step {step}/"):
            os.kill(os.getpid(), signal.SIGINT)

    return say


def final_weights(folder):
    return load_file(folder / "final" / "model.safetensors")


def logits(model, ids=((3, 4, 5, 6),)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids)).logits


def test_a_run_leaves_a_plain_checkpoint_results_and_a_report(recipe, tmp_path):
    results = go(recipe(compare={"repeats": 2}, train={"tensorboard": True}))
    assert results.run.status == "finished"
    assert [point.step for point in results.history] == [1, 2, 3, 4, 5, 6]
    assert results.history[-1].loss < results.history[0].loss
    assert results.before.examples == results.after.examples == 2
    plain, ours = results.compare
    assert ours.gradient_bytes < plain.gradient_bytes
    assert ours.optimizer_bytes < plain.optimizer_bytes
    assert ours.saved_activation_bytes < plain.saved_activation_bytes
    assert plain.loss == pytest.approx(ours.loss, rel=1e-3)
    assert results.memory.total > 0
    assert results.model.parameters == results.model.trainable_parameters

    assert read_results(tmp_path / "run/results.json").history == results.history
    assert "<svg" in (tmp_path / "run/report.html").read_text()
    assert list((tmp_path / "run/runs").rglob("events.*"))
    assert not list((tmp_path / "run/final").glob("*.bin"))  # nothing pickled in what is published
    # Loads where this package is unknown to the loader, and has the trained weights.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    start = load_file(tmp_path / "../" / recipe().model / "model.safetensors")
    moved = final_weights(tmp_path / "run")
    assert moved.keys() == start.keys()
    assert all(not torch.equal(moved[name], start[name]) for name in start)
    kept = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]


def test_dense_gradients_train_and_count_every_weight_once(recipe):
    results = go(recipe(velora={"gradient": "dense"}))
    assert results.history[-1].loss < results.history[0].loss
    assert results.model.parameters == results.model.trainable_parameters


SETTINGS = {
    "random redrawn": {"velora": {"refresh_every": 2}},
    "running average": {"velora": {"init": "running_average"}},
    "late folds": {"velora": {"fold_every": 3}},
    "accumulated": {"train": {"accumulation": 2, "weight_decay": 0.1}},
    "autocast, checkpointed": {
        "dtype": "float32",
        "train": {"autocast": True, "gradient_checkpointing": True},
    },
    "plain": {"velora": None},
    "lora": {"method": "lora"},
    "float32 states of bfloat16 weights": {"velora": None, "train": {"optimizer": "adafactor"}},
    "galore's of the same": {
        "velora": None,
        "train": {"optimizer": "galore_adafactor", "optimizer_settings": {"rank": 4}},
    },
}


@pytest.mark.parametrize("sections", SETTINGS.values(), ids=SETTINGS.keys())
def test_interrupted_and_resumed_is_bitwise_the_uninterrupted_run(recipe, tmp_path, sections):
    go(recipe("whole", **sections))
    half = go(recipe("halves", **sections), interrupt_at(3))
    assert half.run.status == "interrupted"
    assert not (tmp_path / "halves/final").exists()
    resumed = go(recipe("halves", **sections), resume=True)
    assert resumed.run.status == "finished"
    assert [point.step for point in resumed.history] == [1, 2, 3, 4, 5, 6]
    assert resumed.before == half.before
    name = "adapter_model" if "method" in sections else "model"
    whole, halves = (
        load_file(tmp_path / run / f"final/{name}.safetensors") for run in ("whole", "halves")
    )
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


def test_a_full_disk_while_saving_leaves_the_former_checkpoint(recipe, tmp_path, monkeypatch):
    saves = []

    def fail_at_second(model, folder, *rest):
        saves.append(folder)
        if len(saves) == 2:
            raise OSError(28, "No space left on device", str(folder))
        checkpoint.save_state(model, folder, *rest)

    monkeypatch.setattr("velora_torch.integrations.transformers.save_state", fail_at_second)
    with pytest.raises(OSError, match="No space left"):
        go(recipe())
    assert len(saves) == 2
    monkeypatch.undo()
    lines = []
    results = go(recipe(), lines.append, resume=True)
    assert results.run.status == "finished"
    assert f"going on from {tmp_path / 'run/checkpoint-2'}" in lines
    assert [point.step for point in results.history] == [1, 2, 3, 4, 5, 6]
    go(recipe("whole"))
    whole, resumed = final_weights(tmp_path / "whole"), final_weights(tmp_path / "run")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_folder_with_a_run_is_not_touched_unless_asked(recipe, tmp_path):
    go(recipe())
    with pytest.raises(FolderError, match="--resume, replace it with --overwrite"):
        go(recipe())
    go(recipe(train={"steps": 1, "save_every": None}), overwrite=True)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(FolderError, match="no complete checkpoint"):
        go(recipe(), resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("words")
    with pytest.raises(FolderError, match="not empty and not a run"):
        go(recipe("other"), overwrite=True)
    assert (other / "thesis.tex").exists()


def test_bad_data_leaves_no_folder(recipe, tmp_path):
    bad = recipe(data={"max_length": 1000})
    with pytest.raises(ValueError, match="context is 64 tokens"):
        go(bad)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:VeLoRA. compressing these layers frees no:UserWarning")
@pytest.mark.parametrize("rounds", ["finished", "interrupted"])
def test_export_of_a_full_run(recipe, tmp_path, rounds):
    frozen = "model.layers.*_proj"  # a regular expression
    settings = {"velora": {"targets": frozen}, "train": {"optimizer": "sgd"}}
    go(recipe(**settings), interrupt_at(3) if rounds == "interrupted" else lambda line: None)
    export_run(tmp_path / "run", tmp_path / "plain", lora=False)
    names = {p.name for p in (tmp_path / "plain").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {n for n in names if n.startswith("velora") or n.endswith((".pt", ".pth", ".bin"))}
    trained = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32
    )
    export_run(tmp_path / "run", tmp_path / "adapter", lora=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(recipe().model, dtype=torch.float32)
    from peft import PeftModel

    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    # The run rounds its bfloat16 weights at every fold; the adapter does not.
    change = (logits(trained) - before).norm()
    assert (adapted - logits(trained)).norm() < 0.2 * change
    with pytest.raises(FolderError, match="exists"):
        export_run(tmp_path / "run", tmp_path / "plain", lora=False)


def test_export_refuses_redrawn_vectors_before_any_work(recipe, tmp_path):
    go(recipe(velora={"refresh_every": 2}))
    with pytest.raises(ValueError, match="vectors were redrawn"):
        export_run(tmp_path / "run", tmp_path / "adapter", lora=True)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(FolderError, match=r"no recipe\.yaml"):
        export_run(tmp_path / "run/final", tmp_path / "adapter", lora=True)


def test_lora_run_exports_its_adapter_and_the_merged_model(recipe, tmp_path):
    go(recipe(method="lora", dtype="float32"))
    export_run(tmp_path / "run", tmp_path / "adapter", lora=True)
    export_run(tmp_path / "run", tmp_path / "merged", lora=False)
    from peft import PeftModel

    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(recipe().model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(adapted))


def test_qlora_trains_compressed_adapters_on_a_4_bit_base(recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    results = go(recipe(method="qlora", evaluate={"before": True}))
    assert results.history[-1].loss < results.history[0].loss
    assert all("lora_A" in name for name in results.model.compressed_layers)
    assert (tmp_path / "run/final/adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.*:UserWarning:trl")
def test_conversations_are_trained_by_trl(recipe, tmp_path):
    pytest.importorskip("trl")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"task {word}"},
                {"role": "assistant", "content": "yes" if word == "one" else "no"},
            ]
        }
        for word in ("one", "two", "three") * 4
    ]
    path = tiny.save_rows(tmp_path / "chats.jsonl", chats)
    results = go(recipe(data={"train": str(path), "template": "alpaca"}))
    assert results.history[-1].loss < results.history[0].loss
    assert results.after.loss < results.before.loss
    assert (tmp_path / "run/final/model.safetensors").is_file()


TEXTS = [{"text": f"task one {a} two {b} three yes"} for a in tiny.WORDS for b in tiny.WORDS[:4]]


def test_text_is_trained_and_packed(recipe, tmp_path):
    path = tiny.save_rows(tmp_path / "text.jsonl", TEXTS)
    results = go(recipe(data={"train": str(path), "packing": True}, train={"eval_every": 3}))
    assert results.after.loss < results.before.loss
    assert [point.step for point in results.evaluations] == [3, 6]


def command(*arguments, cwd):
    script = "import sys; from velora_torch.cli import main; sys.argv[0] = 'velora'; main()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(recipe, tmp_path):
    recipe()
    done = command("train", "recipe.yaml", "train.steps=2", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 steps of 4 sequences" in done.stdout
    assert not (tmp_path / "run").exists()
    done = command("train", "recipe.yaml", "train.stesp=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean `train.steps`?" in done.stderr
    assert "Traceback" not in done.stderr
    done = command("train", "recipe.yaml", "model=nobody/nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert "nobody/nothing" in done.stderr
    assert "hub" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_saves_and_exits_with_130(recipe, tmp_path, model, rows):
    written = tiny.recipe_dict(model, rows, tmp_path / "run", train={"steps": 100000})
    tiny.save_recipe(tmp_path / "long.yaml", written)
    script = "import sys; from velora_torch.cli import main; sys.argv[0] = 'velora'; main()"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script, "train", "long.yaml", "train.log_every=1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted: saving" in errors
    assert "Traceback" not in errors
    state = json.loads((tmp_path / "run/results.json").read_text())
    assert state["run"]["status"] == "interrupted"
    results = go(load_recipe(tmp_path / "long.yaml", ["train.steps=8"]), resume=True)
    assert results.run.status == "finished"
