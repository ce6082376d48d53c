"""`velora train` in several processes, without a change of the recipe."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

import velora_torch
from tests.closeness import assert_close
from tests.distributed.launch import on_ranks
from tests.distributed.runs import final, go, overrides
from tests.training.pretraining import texts
from velora_torch.training import processes
from velora_torch.training.exporting import export_run
from velora_torch.training.folder import FolderError
from velora_torch.training.recipe import load_recipe
from velora_torch.training.run import Options, run
from velora_torch.training.strategies import chosen, sharding
from velora_torch.training.trainer import RecordingMixin

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(place, alone, strategy, tmp_path):
    losses, weights = alone
    given = overrides(place, strategy)
    first, second = on_ranks(2, go, tmp_path, place / "recipe.yaml", strategy, given)
    assert first[2] == (strategy == "fsdp2")
    assert first[1], "the first process speaks"
    assert not second[1], "and no other"
    assert first[0] == pytest.approx(losses, rel=1e-5)
    found = final(place / strategy)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert_close(found[name], tensor, 1e-4)


def test_adapters_begin_anew_alike_in_all_processes(place, tmp_path):
    """ReLoRA, its adapters compressed."""
    more = ["method=lora", "lora={r: 4, alpha: 8, dropout: 0.0, restart_every: 3}"]
    path = place / "recipe.yaml"
    losses, _, _ = go(path, "ddp", [*overrides(place, "restarts", batch_size=8), *more])
    first, _ = on_ranks(2, go, tmp_path, path, "ddp", [*overrides(place, "restarts-ddp"), *more])
    assert first[0] == pytest.approx(losses, rel=1e-5)
    expected, found = final(place / "restarts"), final(place / "restarts-ddp")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, 1e-4)


def test_weights_in_bfloat16_beside_coefficients_in_float32(place, tmp_path):
    """FSDP2 gets norms and embeddings apart from the coefficients, whose type is another."""
    path, more = place / "recipe.yaml", ["dtype=bfloat16"]
    losses, _, _ = go(path, "ddp", [*overrides(place, "half", batch_size=8), *more])
    given = [*overrides(place, "half-sharded", shard_checkpoints=True), *more]
    first, _ = on_ranks(2, go, tmp_path, path, "fsdp2", given)
    assert first[2]
    assert first[0] == pytest.approx(losses, rel=1e-2)
    expected = final(place / "half")
    for name, tensor in final(place / "half-sharded").items():
        assert tensor.dtype == torch.bfloat16
        assert_close(tensor, expected[name], 5e-2)
    for name in ("checkpoint-6", "checkpoint-8"):
        (place / "half-sharded" / name).rename(place / name)
    again, said, _ = go(
        path, "ddp", [*overrides(place, "half-sharded", batch_size=8), *more], resume=True
    )
    assert any("going on from" in line for line in said)
    assert again == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_biases_in_bfloat16_beside_coefficients_in_float32(place, family, tmp_path):
    """FSDP2 gets them in float32; the final model has them as they were."""
    small = place / f"{family}.json"
    if family == "llama":
        texts.save_config(small, attention_bias=True, mlp_bias=True)
    else:
        settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        settings |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        config = GPT2Config(**settings, architectures=["GPT2LMHeadModel"])
        config.to_json_file(small, use_diff=False)
    more = ["dtype=bfloat16", f"model={small}"]
    path, ranks = place / "recipe.yaml", f"biases-{family}"
    losses, _, _ = go(path, "ddp", [*overrides(place, f"{ranks}-alone", batch_size=8), *more])
    given = [*overrides(place, ranks), *more]
    first, _ = on_ranks(2, go, tmp_path, path, "fsdp2", given)
    assert first[2]
    assert first[0] == pytest.approx(losses, rel=2e-2)
    kept = load_file(place / ranks / "checkpoint-3" / "model.safetensors")
    biases = {name for name, tensor in kept.items() if tensor.dtype == torch.float32}
    assert biases
    assert all(name.endswith("bias") for name in biases)
    # Gradients of half a batch are rounded to bfloat16 before they meet, in DDP as here: a process
    # alone may step elsewhere. Biases have the steps of bfloat16 in DDP.
    on_ranks(2, go, tmp_path / "ddp", path, "ddp", [*overrides(place, f"{ranks}-ddp"), *more])
    found, expected = final(place / ranks), final(place / f"{ranks}-ddp")
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    for name in expected.keys() - biases:
        assert_close(found[name], expected[name], 2e-2)
    assert all(found[name].any() for name in biases)
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(place / ranks / name)
    again, _ = on_ranks(2, _resume, tmp_path / "again", path, given)
    assert again[0] == first[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_another_number_of_processes_goes_on(place, alone, strategy, tmp_path):
    """From a checkpoint of two processes with one; and the other way round."""
    if not (place / strategy).exists():
        given = overrides(place, strategy)
        on_ranks(2, go, tmp_path / "first", place / "recipe.yaml", strategy, given)
    checkpoints = {p.name: p for p in (place / strategy).glob("checkpoint-*")}
    for name in checkpoints.keys() - {"checkpoint-3"}:
        (checkpoints[name]).rename(place / f"{strategy}-{name}")
    given = overrides(place, strategy, batch_size=8)
    losses, said, _ = go(place / "recipe.yaml", "ddp", given, resume=True)
    assert any("going on from" in line for line in said)
    assert losses == pytest.approx(alone[0], rel=1e-5)
    for name, tensor in alone[1].items():
        assert_close(final(place / strategy)[name], tensor, 1e-4)


def test_one_process_s_checkpoint_goes_on_sharded(place, alone, tmp_path):
    for path in (place / "alone").glob("checkpoint-[68]"):
        path.rename(place / f"alone-{path.name}")
    given = overrides(place, "alone")
    path = place / "recipe.yaml"
    (losses, _, sharded), _ = on_ranks(2, _resume, tmp_path, path, given)
    assert sharded
    assert losses == pytest.approx(alone[0], rel=1e-5)
    for name, tensor in alone[1].items():
        assert_close(final(place / "alone")[name], tensor, 1e-4)


def _resume(path, given):
    return go(path, "fsdp2", given, resume=True)


@pytest.fixture(scope="module")
def in_shards(place, tmp_path_factory):
    """The folder of a run of two processes with checkpoints in shards."""
    given = overrides(place, "shards", shard_checkpoints=True)
    folder = tmp_path_factory.mktemp("ranks")
    (_, _, sharded), _ = on_ranks(2, go, folder, place / "recipe.yaml", "fsdp2", given)
    assert sharded
    return place / "shards"


def test_each_process_writes_its_shard(in_shards):
    folder = in_shards / "checkpoint-3"
    assert not (folder / "model.safetensors").exists()
    names = [load_file(path) for path in sorted((folder / "shards").glob("*.safetensors"))]
    assert len(names) == 2
    first, second = ({k: v.numel() for k, v in part.items()} for part in names)
    weights = [name for name in first if first[name] >= 64]
    assert len(weights) > 20
    assert all(second[name] <= first[name] for name in weights)
    assert any(name.endswith("exp_avg") for name in weights)
    assert (folder / "optimizer.pt").stat().st_size < 4096


@pytest.mark.parametrize("ranks", [1, 2])
def test_any_number_of_processes_goes_on_from_shards(place, in_shards, alone, ranks, tmp_path):
    name = f"shards-{ranks}"
    shutil.copytree(
        in_shards, place / name, ignore=shutil.ignore_patterns("checkpoint-[68]", "final")
    )
    given = overrides(place, name, batch_size=8 // ranks, shard_checkpoints=True)
    path = place / "recipe.yaml"
    if ranks == 1:
        losses, said, _ = go(path, "ddp", given, resume=True)
    else:
        (losses, said, _), _ = on_ranks(2, _resume, tmp_path, path, given)
    assert any("going on from" in line and "checkpoint-3" in line for line in said)
    assert losses == pytest.approx(alone[0], rel=1e-5)
    for key, tensor in alone[1].items():
        assert_close(final(place / name)[key], tensor, 1e-4)


def test_an_interrupted_run_in_shards_is_exported(place, in_shards, tmp_path):
    """As one whole file, which has the weights of a checkpoint that is whole itself."""
    for name, source in (("in-shards", in_shards), ("in-one", place / "alone")):
        left_out = shutil.ignore_patterns("final", "checkpoint-[68]")
        shutil.copytree(source, place / name, ignore=left_out)
        export_run(place / name, tmp_path / name, lora=False)
        assert not (tmp_path / name / "shards").exists()
    there = load_file(tmp_path / "in-shards" / "model.safetensors")
    expected = load_file(tmp_path / "in-one" / "model.safetensors")
    assert there.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_close(there[key], tensor, 1e-4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "in-shards")
    with pytest.raises(FolderError, match=r"in shards.*without --lora"):
        export_run(place / "in-shards", tmp_path / "adapter", lora=True)


def test_damaged_shards_are_known_before_training(place, in_shards):
    shutil.copytree(
        in_shards, place / "cut", ignore=shutil.ignore_patterns("final", "checkpoint-8")
    )
    for step in (3, 6):
        shard = place / "cut" / f"checkpoint-{step}" / "shards"
        next(shard.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"shard-.*safetensors is missing"):
        go(place / "recipe.yaml", "ddp", overrides(place, "cut", batch_size=8), resume=True)


def _terminated(path, given):
    """Train; the second rank alone gets SIGTERM, in its third step."""
    real, taken = RecordingMixin.training_step, []

    def training_step(self, *args):
        taken.append(None)
        if len(taken) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    RecordingMixin.training_step = training_step
    results = run(load_recipe(path, given), Options(report=False), lambda line: None)
    return results.run.status, results.run.signal, results.history[-1].step


def test_a_signal_to_one_process_stops_all_after_the_same_step(place, alone, tmp_path):
    given = overrides(place, "terminated")
    told = on_ranks(2, _terminated, tmp_path, place / "recipe.yaml", given)
    assert told == [("interrupted", signal.SIGTERM, 3)] * 2
    losses, _, _ = go(place / "recipe.yaml", "ddp", [*given, "train.batch_size=8"], resume=True)
    assert losses == pytest.approx(alone[0], rel=1e-5)


def test_the_command_under_torchrun(place):
    """What a user types; one process speaks, and errors are messages."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["-m", "velora_torch", "train", str(place / "recipe.yaml")]
    command += overrides(place, "command", steps=2)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("step 2/2") == 1
    assert ran.stdout.count("Results:") == 1
    assert (place / "command" / "final" / "model.safetensors").is_file()
    assert torch.isfinite(next(iter(final(place / "command").values()))).all()


def lose_one():
    """What the first process learns when the second one is gone in the middle of a run."""
    try:
        with processes.joined():
            if dist.get_rank():
                os._exit(0)
            processes.any_of(True)
    except processes.LostProcessError as error:
        return str(error)


def test_a_lost_process_is_a_message(tmp_path):
    torch.save(None, tmp_path / "result-1")  # which it can't give
    message, _ = on_ranks(2, lose_one, tmp_path)
    assert "process 0 of 2 has lost another one" in message
    assert "--resume" in message


def test_sharding_needs_processes(place):
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        chosen("fsdp2")


def test_what_is_of_another_type_than_the_coefficients_is_sharded_apart():
    layers = [torch.nn.Linear(8, 8, bias=False), torch.nn.LayerNorm(8)]
    config = velora_torch.VeloraConfig(num_groups=2)
    model = velora_torch.compress(torch.nn.Sequential(*layers).bfloat16(), config)
    assert sharding("ddp", model) == {}
    kinds = sharding("fsdp2", model)["fsdp_config"]["transformer_layer_cls_to_wrap"]
    assert kinds == ["LayerNorm"]
    assert sharding("fsdp2", model.float())["fsdp_config"]["auto_wrap_policy"] == "NO_WRAP"


def test_a_layer_of_two_types_is_not_sharded():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).bfloat16()
    velora_torch.compress(model, velora_torch.VeloraConfig(num_groups=2))
    with pytest.raises(ValueError, match=r"'0' has bfloat16, float32 .*set dtype: float32"):
        sharding("fsdp2", model)
    assert sharding("fsdp2", model.float())["fsdp"]


def test_a_shared_weight_of_another_type_is_not_sharded():
    layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(3)]
    layers[2].weight = layers[1].weight
    model = torch.nn.Sequential(*layers).bfloat16()
    velora_torch.compress(model, velora_torch.VeloraConfig(num_groups=2, targets=["0"]))
    with pytest.raises(ValueError, match=r"'1' has bfloat16 and shares its weight"):
        sharding("fsdp2", model)
