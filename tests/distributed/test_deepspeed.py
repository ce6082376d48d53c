"""DeepSpeed's ZeRO-1 and 2 train as one process without it does; its other ways are refused."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import velora_torch as velora
from tests.closeness import assert_bitwise, assert_close
from tests.distributed import training, zero
from tests.distributed.launch import on_ranks
from tests.distributed.training import Setup

installed = pytest.mark.skipif(not zero.is_installed(), reason="`make test` installs DeepSpeed")

AVERAGE = {"num_groups": 4}
SIGNS = {"init": "rademacher", "vectors": "per_group", "num_groups": 4, "refresh_every": 4}
RUNNING = {"init": "running_average", "vectors": "per_group", "num_groups": 5}
# Its copies of the parameters are float32, so that float64 would show no more.
FLOAT32 = {"dtype": torch.float32, "steps": 9}
SETUPS = {
    "average": Setup("zero1", config=AVERAGE, **FLOAT32),
    "accumulated-clipped": Setup("zero2", config=SIGNS, accumulation=2, clip=0.5, **FLOAT32),
    "running": Setup("zero2", config=RUNNING, **FLOAT32),
    "dense": Setup("zero1", config={**AVERAGE, "gradient": "dense"}, **FLOAT32),
    "sgd": Setup("zero2", config=SIGNS, optimizer="sgd", clip=0.5, **FLOAT32),
    "every-3": Setup("zero2", config={**AVERAGE, "fold_every": 3}, **FLOAT32),
    "never-folded": Setup("zero1", config={**AVERAGE, "fold_every": None}, **FLOAT32),
    "conv1d": Setup("zero2", config=RUNNING, family="gpt2", optimizer="sgd", **FLOAT32),
    "lora": Setup("zero2", "lora", AVERAGE, optimizer="sgd", accumulation=2, **FLOAT32),
    "loha": Setup("zero1", "loha", RUNNING, optimizer="sgd", **FLOAT32),
    "bf16": Setup("zero2", config=SIGNS, dtype=torch.bfloat16, steps=9),
}
BITWISE = ("average", "running", "dense", "never-folded", "conv1d", "lora", "loha")
"""Not those that clip (DeepSpeed sums the norm in another order), fold later, or have bfloat16."""


@pytest.fixture(scope="module")
def alone():
    """What one process trains without DeepSpeed."""

    @functools.cache
    def by(name):
        former, training.make_optimizer = training.make_optimizer, zero.make_optimizer
        try:
            return training.train(SETUPS[name])
        finally:
            training.make_optimizer = former

    return by


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return on_ranks(2, zero.train_all, tmp_path_factory.mktemp("zero"), SETUPS)


@installed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETUPS)
def test_ranks_train_as_one(trained, alone, name):
    first, second = (result[name] for result in trained)
    assert first.keys() == second.keys() >= alone(name).keys()
    for key, value in first.items():
        if not isinstance(value, torch.Tensor):
            assert value == second[key]
            assert value["steps"] == SETUPS[name].steps
            continue
        assert_bitwise(value, second[key])
        if name != "bf16":  # its copies are float32: not what a process without them trains
            assert_close(value, alone(name)[key], 1e-5)


@installed
@pytest.mark.filterwarnings("ignore")
def test_one_process_has_the_bits_of_a_training_without_it(alone, tmp_path):
    (results,) = on_ranks(1, zero.train_all, tmp_path, {name: SETUPS[name] for name in BITWISE})
    for name, result in results.items():
        for key, expected in alone(name).items():
            assert_bitwise(result[key], expected)


@installed
def test_coefficients_in_float32_beside_weights_in_bfloat16(trained):
    for result in trained:
        weight = result["bf16"]["model.layers.0.mlp.up_proj.weight"]
        assert weight.dtype == torch.bfloat16
        assert torch.isfinite(weight).all()
        counters = result["bf16"]["model.layers.0.mlp.up_proj.counters"]
        assert counters["folds"] == 9
        assert counters["draws"] == 3
        assert counters["direction"] == "sign"


@installed
def test_a_step_that_overflows_changes_nothing(tmp_path):
    for before, after in on_ranks(2, zero.overflow, tmp_path, replace(SETUPS["bf16"], steps=2)):
        for key, value in before.items():
            if isinstance(value, torch.Tensor):
                assert_bitwise(after[key], value)
            else:
                assert after[key] == value


@installed
@pytest.mark.parametrize("name", ["accumulated-clipped", "never-folded", "bf16"])
def test_resuming_gives_the_same_bits(name, tmp_path):
    folder = str(tmp_path / "saved")
    for expected, result in on_ranks(2, zero.save_and_resume, tmp_path / "x", SETUPS[name], folder):
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert_bitwise(result[key], value)
            else:
                assert result[key] == value


@installed
def test_hugging_faces_trainer(tmp_path):
    paths = [str(zero.FOLDER), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.distributed.zero_trainer", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    for case in told.values():
        assert case["optimizer"] == "DeepSpeedZeroOptimizer"
        assert all(len(types) == 1 for types in case["types"])
        assert case["bits_when_resumed"]
    assert told["float32"]["bits_of_plain"]
    assert len(told["bfloat16"]["types"]) == 3  # the decayed ones are of two


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@installed
def test_other_ways_of_deepspeed_are_refused(tmp_path):
    # In bfloat16 without ZeRO it has an optimizer with flat copies of its own.
    setup = replace(SETUPS["bf16"], strategy="zero0")
    (message,) = on_ranks(1, zero.refusal, tmp_path, setup, {"bf16": {"enabled": True}})
    assert "DeepSpeed trains layer" in message
    assert "zero_optimization.stage 1 or 2" in message


@installed
def test_optimizers_that_are_not_exact_are_refused_by_name(tmp_path):
    setup = replace(SETUPS["average"], optimizer="adadelta")
    (message,) = on_ranks(1, zero.refusal, tmp_path, setup, {})
    assert "Adadelta on coefficients would not give" in message


def pieces(model, mark):
    """What other ways of DeepSpeed do: they mark parameters, and step a flat copy of them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        setattr(parameter, mark, None)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in trained]))
    flat.grad = torch.cat([p.grad.flatten() for p in trained])
    return flat, torch.optim.AdamW([flat], lr=0.1)


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
@pytest.mark.parametrize("gradient", ["factored", "dense"])
def test_flat_copies_that_are_not_followed_are_not_stepped(gradient, mark):
    config = velora.VeloraConfig(num_groups=2, gradient=gradient, targets=["0"])
    model = velora.compress(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), config)
    model(torch.randn(3, 8)).square().sum().backward()
    flat, optimizer = pieces(model, mark)
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match=r"DeepSpeed trains layer '0'.*--strategy fsdp2"):
        optimizer.step()
    assert_bitwise(flat.detach(), before)
    for parameter in model.parameters():
        parameter.__dict__.pop(mark, None)


def test_plain_models_are_nobodys_affair():
    config = velora.VeloraConfig(num_groups=2, targets=["0"])
    model = velora.restore(velora.compress(nn.Sequential(nn.Linear(8, 4)), config))
    model(torch.randn(3, 8)).square().sum().backward()
    flat, optimizer = pieces(model, "_hp_mapping")
    before = flat.detach().clone()
    optimizer.step()
    assert (flat.detach() - before).abs().max() > 0.05
