"""`velora train --tensor-parallel`: layers split over processes, by the model's own plan."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from torch import nn

pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config
from typer.testing import CliRunner

import velora_torch as velora
from tests.architectures.catalogue import CATALOGUE
from tests.closeness import assert_bitwise, assert_close
from tests.distributed.by_plan import refusal, shared_random, split_architectures, steps
from tests.distributed.launch import on_ranks
from tests.distributed.runs import final, go, overrides
from velora_torch import cli
from velora_torch.integrations.tensor_parallel import PlanError, check_plan
from velora_torch.training import processes, strategies
from velora_torch.training.nonfinite import NonFiniteError
from velora_torch.training.recipe import load_recipe
from velora_torch.training.trainer import RecordingMixin

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

ACCUMULATED = {"accumulation": 2, "max_grad_norm": 0.1, "weight_decay": 0.1, "warmup": 2}
NAMES = split_architectures()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(2, steps, tmp_path_factory.mktemp("ranks"), NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_architectures_with_a_plan_train_as_whole_ones(ranks, name):
    """With vectors that are redrawn, and whole again at the end."""
    expected = steps([name])[name]
    for result in ranks:
        assert result[name].keys() == expected.keys()
        for key, tensor in expected.items():
            assert_close(result[name][key], tensor, 1e-7)  # some have norms in float32


def test_there_are_such_architectures():
    """Dense ones, those with norms of heads, experts, and images beside text."""
    assert len(NAMES) >= 18
    assert {"llama", "qwen3", "gemma3", "olmo2", "mixtral", "qwen3_moe", "llava"} <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "has no plan for tensor parallel"),
        ("vit", "has no plan for tensor parallel"),
        ("phi3", "splits none of its layers"),
    ],
)
def test_others_are_refused(name, why):
    (architecture,) = [a for a in CATALOGUE if a.name == name]
    message = refusal(architecture)
    assert why in message
    assert "--strategy fsdp2" in message


def llama(**settings):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=66,
        num_hidden_layers=1,
        num_attention_heads=4,
        **settings,
    )
    return LlamaForCausalLM(config)


def test_what_can_not_be_divided_is_refused():
    with pytest.raises(PlanError, match=r"num_key_value_heads is 1, no multiple of 2"):
        check_plan(llama(num_key_value_heads=1), 2)
    with pytest.raises(PlanError, match=r"gate_proj' is to be split colwise, and 66 features"):
        check_plan(llama(), 4)


def test_parts_that_are_not_whole_groups_are_refused():
    model = velora.compress(llama(), velora.VeloraConfig(num_groups=11, targets=["down_proj"]))
    with pytest.raises(PlanError, match=r"down_proj' is to be split rowwise, 33 .*groups have 6"):
        check_plan(model, 2)


def test_styles_that_are_not_known_are_refused():
    model = llama()
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.down_proj": "packed_rowwise"}
    with pytest.raises(PlanError, match=r"has 'model.layers.0.mlp.down_proj' as packed_rowwise"):
        check_plan(model, 2)
    # Nor what lies inside of a module that does something of its own with its parts.
    model._tp_plan = {**llama()._tp_plan, "model.layers.*.mlp": "moe_tp_experts"}
    with pytest.raises(PlanError, match=r"has 'model.layers.0.mlp' as moe_tp_experts"):
        check_plan(model, 2)
    model._tp_plan = {"model.norm": "colwise"}
    with pytest.raises(PlanError, match=r"splits 'model.norm', which is no nn.Linear"):
        check_plan(model, 2)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)


# ------------------------------------------------------------------ whole runs


def split(path, given, **options):
    return go(path, "ddp", given, tensor_parallel=2, **options)


def resumed(path, given):
    return split(path, given, resume=True)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_two_processes_train_as_one(place, tmp_path):
    """With micro-batches, clipping, decay and warming up."""
    path, more = place / "recipe.yaml", {**ACCUMULATED, "eval_every": 4}
    first, second = on_ranks(2, split, tmp_path, path, overrides(place, "split", **more))
    assert any("held-out loss" in line for line in first[1])
    assert not second[1]
    losses, _, _ = go(path, "ddp", overrides(place, "split-alone", **more))
    assert first[0] == pytest.approx(losses, rel=1e-5)
    for name, tensor in final(place / "split-alone").items():
        assert_close(final(place / "split")[name], tensor, 1e-4)
    told, expected = results(place / "split"), results(place / "split-alone")
    for kind, key in (("history", "grad_norm"), ("evaluations", "loss")):
        found = [point[key] for point in told[kind]]
        assert found == pytest.approx([point[key] for point in expected[kind]], rel=1e-4)
    assert told["after"]["loss"] == pytest.approx(expected["after"]["loss"], rel=1e-4)
    # Embeddings and head, most of a model as small as this, are whole in each.
    shares = {"weights": 0.8, "saved_activations": 0.8, "gradients": 0.95, "optimizer_state": 0.95}
    for kind, share in shares.items():
        assert told["memory"][kind] < share * expected["memory"][kind]


def split_and_sharded(path, given, **options):
    return go(path, "fsdp2", given, tensor_parallel=2, **options)


def split_and_sharded_again(path, given):
    return split_and_sharded(path, given, resume=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_processes_split_and_shard(place, dtype, tmp_path):
    """Two groups of two, with norms of heads, whose gradients are added up."""
    config = {
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "architectures": ["Qwen3ForCausalLM"],
    }
    Qwen3Config(**config).to_json_file(place / "qwen3.json", use_diff=False)
    path, name = place / "recipe.yaml", f"2x2-{dtype}"
    more = [f"model={place / 'qwen3.json'}", f"dtype={dtype}"]
    exact = dtype == "float32"
    settings = {**ACCUMULATED, "eval_every": 4, "steps": 8 if exact else 4}
    given = [*overrides(place, name, **settings), *more]
    first, *others = on_ranks(4, split_and_sharded, tmp_path / "first", path, given)
    assert not any(said for _, said, _ in others)
    alone = [*overrides(place, f"{name}-alone", **settings | {"batch_size": 8}), *more]
    losses, _, _ = go(path, "ddp", alone)
    assert first[0] == pytest.approx(losses, rel=1e-5 if exact else 2e-2)
    told, expected = results(place / name), results(place / f"{name}-alone")
    near = pytest.approx(expected["after"]["loss"], rel=1e-4 if exact else 2e-2)
    assert told["after"]["loss"] == near
    assert told["evaluations"][0]["loss"] == pytest.approx(
        expected["evaluations"][0]["loss"], rel=1e-4 if exact else 2e-2
    )
    found, weights = final(place / name), final(place / f"{name}-alone")
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert found[key].dtype == tensor.dtype
        if exact:
            assert_close(found[key], tensor, 1e-4)
    if not exact:
        return
    for step in (6, 8):
        shutil.rmtree(place / name / f"checkpoint-{step}")
    again, *_ = on_ranks(4, split_and_sharded_again, tmp_path / "again", path, given)
    assert again[0] == first[0]
    for key, tensor in final(place / name).items():
        assert_bitwise(tensor, found[key])


def test_autocast(place, tmp_path):
    path = place / "recipe.yaml"
    given = overrides(place, "split-auto", autocast=True)
    (losses, _, _), _ = on_ranks(2, split, tmp_path, path, given)
    expected, _, _ = go(path, "ddp", overrides(place, "whole-auto", autocast=True))
    assert losses == pytest.approx(expected, rel=2e-2)


def with_a_bad_gradient(path, given):
    """Train; in the fourth step the gradients of one process alone are not finite."""
    real = RecordingMixin.training_step

    def training_step(self, model, *rest):
        layer = self.model.model.layers[1].mlp.up_proj
        spoil = self.state.global_step == 3 and os.environ["RANK"] == "1"
        hook = layer.register_full_backward_pre_hook(lambda _, g: (g[0] * float("nan"),))
        if not spoil:
            hook.remove()
        try:
            return real(self, model, *rest)
        finally:
            hook.remove()

    RecordingMixin.training_step = training_step
    try:
        split(path, given)
    except NonFiniteError as error:
        return str(error)
    finally:
        RecordingMixin.training_step = real


def test_a_step_that_is_not_finite_in_one_process_is_named_by_it(place, tmp_path):
    messages = on_ranks(
        2, with_a_bad_gradient, tmp_path, place / "recipe.yaml", overrides(place, "nan")
    )
    assert all("step 4" in message for message in messages)
    assert "up_proj" in messages[1]
    assert (place / "nan" / "checkpoint-3").is_dir()


def test_random_numbers_are_the_same_after_resuming(place, tmp_path):
    """From a checkpoint of processes that had drawn different ones."""
    first, second = on_ranks(2, shared_random, tmp_path)
    assert first == second


def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(place, tmp_path):
    """And one process goes on from the checkpoint too."""
    path, given = place / "recipe.yaml", overrides(place, "bits", accumulation=2)
    (losses, _, _), _ = on_ranks(2, split, tmp_path / "first", path, given)
    expected = final(place / "bits")
    for step in (6, 8):
        shutil.rmtree(place / "bits" / f"checkpoint-{step}")
    shutil.copytree(place / "bits", place / "one", ignore=shutil.ignore_patterns("final"))
    (again, said, _), _ = on_ranks(2, resumed, tmp_path / "again", path, given)
    assert any("going on from" in line and "checkpoint-3" in line for line in said)
    assert again == losses
    for key, tensor in final(place / "bits").items():
        assert_bitwise(tensor, expected[key])
    alone, _, _ = go(path, "ddp", overrides(place, "one", accumulation=2), resume=True)
    assert alone == pytest.approx(losses, rel=1e-5)
    for key, tensor in final(place / "one").items():
        assert_close(tensor, expected[key], 1e-4)


def test_it_goes_on_from_shards(place, alone, tmp_path):
    name, path = "shards-split", place / "recipe.yaml"
    given = overrides(place, name, shard_checkpoints=True)
    on_ranks(2, go, tmp_path / "first", path, "fsdp2", given)
    for step in (6, 8):
        shutil.rmtree(place / name / f"checkpoint-{step}")
    given = overrides(place, name, batch_size=8)
    (losses, _, _), _ = on_ranks(2, resumed, tmp_path / "then", path, given)
    assert losses == pytest.approx(alone[0], rel=1e-5)
    for key, tensor in alone[1].items():
        assert_close(final(place / name)[key], tensor, 1e-4)


def test_token_budgets_count_the_examples_that_all_take_once(place, monkeypatch):
    recipe = load_recipe(place / "recipe.yaml")
    alone = recipe.steps()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert recipe.steps() == alone // 2
    with processes.alike(2):
        assert recipe.steps() == alone
    assert recipe.steps() == alone // 2


# ------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    ("size", "strategy", "change", "message"),
    [
        (0, "ddp", {}, r"--tensor-parallel 0: give the number"),
        (4, "ddp", {}, r"processes is 2, no multiple of it: .*torchrun --nproc-per-node 4"),
        (2, "fsdp2", {}, r"2 processes and --strategy fsdp2 don't go together"),
        (2, "ddp", {"method": "lora"}, r"method: lora puts .*use method: full"),
        (2, "ddp", {"memory_budget": "1GiB"}, r"memory_budget can't be planned for --tensor"),
        (2, "ddp", {"optimizer": "adafactor"}, r"'adafactor' needs them whole: .*adamw_torch"),
    ],
)
def test_what_it_does_not_do_is_refused(place, monkeypatch, size, strategy, change, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = load_recipe(place / "recipe.yaml")
    if "optimizer" in change:
        change = {"train": recipe.train.model_copy(update=change)}
    with pytest.raises(ValueError, match=message):
        strategies.check_split(size, strategy, recipe.model_copy(update=change))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ("ddp", 1)),
        (["--tensor-parallel", "2"], ("ddp", 2)),
        (["--strategy", "fsdp2"], ("fsdp2", 1)),
    ],
)
def test_the_command_hands_on_what_is_asked_for(place, monkeypatch, options, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []

    def run(recipe, options, say):
        told.append((options.strategy, options.tensor_parallel))
        raise ValueError("seen")

    monkeypatch.setattr("velora_torch.training.run.run", run)
    command = ["train", str(place / "recipe.yaml"), *overrides(place, "asked"), *options]
    with pytest.raises(ValueError, match="seen"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert told == [expected]
