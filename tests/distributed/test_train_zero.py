"""`velora train` by DeepSpeed's ZeRO-1 and 2, with the recipe of any other training."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from tests.closeness import assert_bitwise, assert_close
from tests.distributed import zero
from tests.distributed.launch import on_ranks
from tests.distributed.runs import final, go, overrides
from velora_torch.integrations.zero_trainer import COPIES
from velora_torch.training import strategies
from velora_torch.training.nonfinite import NonFiniteError
from velora_torch.training.recipe import load_recipe
from velora_torch.training.run import Options, run
from velora_torch.training.trainer import RecordingMixin

installed = pytest.mark.skipif(not zero.is_installed(), reason="`make test` installs DeepSpeed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

LORA = [
    "method=lora",
    "lora.r=4",
    "lora.dropout=0",
    "lora.targets=[q_proj, down_proj]",
    "train.learning_rate=0.05",
]
ACCUMULATED = {"accumulation": 2, "max_grad_norm": 0.1, "weight_decay": 0.1, "warmup": 2}


def by_zero(*args, **options):
    # What was imported without DeepSpeed beside it must not find it half-way.
    importlib.import_module("velora_torch.training.trainer")
    zero.deepspeed()
    return go(*args, **options)


def resumed(*args):
    return by_zero(*args, resume=True)


def same_weights(folder, other, tolerance=1e-4):
    found, expected = final(folder), final(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, tolerance)


@installed
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_two_processes_train_as_one(place, strategy, tmp_path):
    """With micro-batches, clipping, decay and warming up; each holds half of the states."""
    given = overrides(place, strategy, **ACCUMULATED, eval_every=4)
    first, second = on_ranks(2, by_zero, tmp_path, place / "recipe.yaml", strategy, given)
    assert any("held-out loss" in line for line in first[1])
    assert not second[1]
    alone = overrides(place, f"{strategy}-alone", **ACCUMULATED | {"batch_size": 8})
    losses, _, _ = go(place / "recipe.yaml", "ddp", alone)
    assert first[0] == pytest.approx(losses, rel=1e-5)
    same_weights(place / strategy, place / f"{strategy}-alone")
    both = (
        json.loads((place / name / "results.json").read_text())
        for name in (strategy, f"{strategy}-alone")
    )
    told, expected = (results["memory"] for results in both)
    norms = [
        [p["grad_norm"] for p in json.loads((place / n / "results.json").read_text())["history"]]
        for n in (strategy, f"{strategy}-alone")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    # The gradients of one process, and under ZeRO-2 its half of them.
    whole = 1 if strategy == "zero1" else 2
    assert told["gradients"] == pytest.approx(expected["gradients"] / whole, rel=0.02)
    # Two moments and a copy in halves, instead of two whole ones.
    assert told["optimizer_state"] == pytest.approx(expected["optimizer_state"] * 3 / 4, rel=0.02)


@installed
def test_autocast(place, tmp_path):
    given = overrides(place, "autocast", autocast=True)
    (losses, _, _), _ = on_ranks(2, by_zero, tmp_path, place / "recipe.yaml", "zero2", given)
    expected, _, _ = go(
        place / "recipe.yaml",
        "ddp",
        overrides(place, "autocast-alone", autocast=True, batch_size=8),
    )
    exact, _, _ = go(place / "recipe.yaml", "ddp", overrides(place, "exact", batch_size=8))
    assert losses == pytest.approx(expected, rel=2e-3)
    assert losses[0] != pytest.approx(exact[0], rel=1e-6), "products have bfloat16 precision"


@installed
def test_adapters(place, tmp_path):
    given = [*overrides(place, "lora"), *LORA]
    (losses, _, _), _ = on_ranks(2, by_zero, tmp_path, place / "recipe.yaml", "zero2", given)
    expected, _, _ = go(
        place / "recipe.yaml", "ddp", [*overrides(place, "lora-alone", batch_size=8), *LORA]
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    same_weights(place / "lora", place / "lora-alone")


@installed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(place, dtype, tmp_path):
    name, path = f"bits-{dtype}", place / "recipe.yaml"
    given = [*overrides(place, name, accumulation=2), f"dtype={dtype}"]
    (losses, _, _), _ = on_ranks(2, by_zero, tmp_path / "first", path, "zero2", given)
    expected = final(place / name)
    assert (place / name / "checkpoint-3" / COPIES).exists() == (dtype == "bfloat16")
    for step in (6, 8):
        shutil.rmtree(place / name / f"checkpoint-{step}")
    (again, said, _), _ = on_ranks(2, resumed, tmp_path / "again", path, "zero2", given)
    assert any("going on from" in line and "checkpoint-3" in line for line in said)
    assert again == losses
    for key, tensor in final(place / name).items():
        assert tensor.dtype == getattr(torch, dtype)
        assert_bitwise(tensor, expected[key])


@installed
@pytest.mark.parametrize(
    ("first", "then", "dtype"),
    [
        ("zero2", "ddp", "float32"),
        ("zero2", "ddp", "bfloat16"),  # ZeRO's moments are float32, AdamW's are not
        ("ddp", "zero1", "float32"),
        ("fsdp2", "zero2", "float32"),
    ],
)
def test_other_strategies_go_on(place, alone, first, then, dtype, tmp_path):
    """From its checkpoints without it, and the other way round; from shards too."""
    name, path = f"{first}-{then}-{dtype}", place / "recipe.yaml"

    def part(strategy, function, folder, **options):
        ranks = 1 if strategy == "ddp" else 2
        shards = strategy == "fsdp2"
        given = overrides(place, name, batch_size=8 // ranks, shard_checkpoints=shards)
        given = [*given, f"dtype={dtype}"]
        if ranks == 1:
            return go(path, strategy, given, **options)
        return on_ranks(2, function, folder, path, strategy, given)[0]

    part(first, by_zero if first != "fsdp2" else go, tmp_path / "first")
    for step in (6, 8):
        shutil.rmtree(place / name / f"checkpoint-{step}")
    options = {"resume": True} if then == "ddp" else {}
    losses, said, _ = part(then, resumed, tmp_path / "then", **options)
    assert any("going on from" in line and "checkpoint-3" in line for line in said)
    exact = dtype == "float32"
    assert losses == pytest.approx(alone[0], rel=1e-5 if exact else 3e-2)
    if exact:
        same_weights(place / name, place / "alone")


def with_a_bad_step(path, strategy, given):
    """Train; the fourth step has an infinite loss in its first micro-batch."""
    importlib.import_module("velora_torch.training.trainer")
    if strategy != "ddp":
        zero.deepspeed()
    real, taken = RecordingMixin.training_step, []

    def training_step(self, model, inputs, *rest):
        taken.append(self.state.global_step)
        bad = self.state.global_step == 3 and taken.count(3) % 2
        if not bad:
            return real(self, model, inputs, *rest)
        layer = self.model.model.layers[1].mlp.down_proj
        forward, layer.forward = layer.forward, lambda x: forward(x) * float("inf")
        try:
            return real(self, model, inputs, *rest)
        finally:
            del layer.forward

    RecordingMixin.training_step = training_step
    try:
        said = []
        results = run(
            load_recipe(path, given), Options(report=False, strategy=strategy), said.append
        )
    except NonFiniteError as error:
        return str(error)
    finally:
        RecordingMixin.training_step = real
    return [point.loss for point in results.history], said, results.notes


@installed
def test_a_step_that_is_not_finite_is_left_out(place, tmp_path):
    more = {"accumulation": 2, "on_nonfinite": "skip"}
    path = place / "recipe.yaml"
    (losses, said, notes), _ = on_ranks(
        2, with_a_bad_step, tmp_path, path, "zero2", overrides(place, "skip", **more)
    )
    assert any("step 4" in line and "skipped (1 of at most 10)" in line for line in said)
    assert "steps 4" in notes[0]
    alone = overrides(place, "skip-alone", **more | {"batch_size": 8})
    expected, _, _ = with_a_bad_step(path, "ddp", alone)
    assert losses == pytest.approx(expected, rel=1e-5, nan_ok=True)
    same_weights(place / "skip", place / "skip-alone")


@installed
def test_a_step_that_is_not_finite_is_named(place, tmp_path):
    given = overrides(place, "stop", accumulation=2)
    for message in on_ranks(2, with_a_bad_step, tmp_path, place / "recipe.yaml", "zero1", given):
        assert "step 4" in message
        assert "down_proj" in message
    assert (place / "stop" / "checkpoint-3").is_dir()


@installed
def test_accelerates_launcher(place):
    """What a user types, where DeepSpeed lies among the other packages."""
    train = [str(place / "recipe.yaml"), *overrides(place, "launched", steps=2)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed"]
    command += ["--zero_stage=1", "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no"]
    command += ["-m", "velora_torch", "train", *train]
    paths = os.pathsep.join([str(zero.FOLDER), *filter(None, sys.path)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("step 2/2") == 1
    assert ran.stdout.count("Results:") == 1
    assert all(torch.isfinite(tensor).all() for tensor in final(place / "launched").values())


# ------------------------------------------------------------------ what is asked for


@pytest.fixture
def two(monkeypatch):
    """As one of two processes, where DeepSpeed is installed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        strategies.importlib.util,
        "find_spec",
        lambda name: name if name == "deepspeed" else real(name),
    )
    return monkeypatch


def launched(patch, **told):
    patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in told.items():
        patch.setenv(f"ACCELERATE_DEEPSPEED_{name.upper()}", value)


def test_what_accelerate_was_told_is_the_strategy(two):
    assert strategies.chosen(None) == "ddp"
    launched(two, zero_stage="1", offload_optimizer_device="none")
    assert strategies.chosen(None) == "zero1"
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ, "it would step by itself"
    launched(two, zero_stage="2")
    assert strategies.chosen("zero2") == "zero2"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"zero_stage": "3"}, r"stage 3: use 1 or 2, or --strategy fsdp2"),
        ({"config_file": "x.json"}, r"configuration file"),
        ({"offload_optimizer_device": "cpu"}, r"offloading"),
    ],
)
def test_what_else_accelerate_was_told_is_refused(two, told, message):
    launched(two, **told)
    with pytest.raises(ValueError, match=message):
        strategies.chosen(None)


def test_two_strategies_are_refused(two):
    launched(two, zero_stage="2")
    with pytest.raises(ValueError, match=r"fsdp2, and accelerate.*zero2.*leave one of them out"):
        strategies.chosen("fsdp2")


def test_it_needs_processes_and_deepspeed(monkeypatch):
    with pytest.raises(ValueError, match=r"zero1 shares .*torchrun --nproc-per-node"):
        strategies.chosen("zero1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(strategies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install deepspeed; or use --strategy fsdp2"):
        strategies.chosen("zero1")


@pytest.mark.parametrize(
    "name", ["galore_adamw", "apollo_adamw", "flora", "adamw_bnb_8bit", "paged_adamw_32bit"]
)
def test_optimizers_that_cannot_be_sharded_are_refused(place, name):
    settings = [] if "adamw_" in name else ["train.optimizer_settings={rank: 4}"]
    given = [*overrides(place, "sharded"), f"train.optimizer={name}", *settings]
    with pytest.raises(ValueError, match=rf"fsdp2 gives .*{name}.*adamw_torch.*--strategy ddp"):
        go(place / "recipe.yaml", "fsdp2", given)
    assert not (place / "sharded").exists()


def test_recipes_that_it_cannot_train_are_refused(place):
    given = [*overrides(place, "refused"), "train.optimizer=adafactor"]
    with pytest.raises(ValueError, match=r"flat pieces .*adafactor.*adamw_torch"):
        go(place / "recipe.yaml", "zero2", given)
    assert not (place / "refused").exists()
    for more, message in (
        ({"dtype": "float16"}, r"not for dtype: float16.*use bfloat16"),
        ({"method": "adalora"}, r"not for method: adalora.*use lora"),
    ):
        changed = load_recipe(place / "recipe.yaml").model_copy(update=more)
        with pytest.raises(ValueError, match=message):
            strategies.check_trained("zero2", changed)
    restarts = load_recipe(place / "recipe.yaml", ["method=lora", "lora.restart_every=2"])
    for strategy in ("fsdp2", "zero1"):
        with pytest.raises(ValueError, match=rf"{strategy} gives .*restart_every.*--strategy ddp"):
            strategies.check_trained(strategy, restarts)
    recipe = load_recipe(place / "recipe.yaml").model_copy(update={"memory_budget": "1GiB"})
    with pytest.raises(ValueError, match=r"memory_budget can't be planned for --strategy zero1"):
        strategies.check_trained("zero1", recipe)
