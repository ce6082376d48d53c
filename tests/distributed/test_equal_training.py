"""Several ranks with a part of each batch train as one rank does with the whole of it."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.closeness import assert_bitwise, assert_close
from tests.distributed.launch import on_ranks
from tests.distributed.training import Setup, train, train_all

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

AVERAGE = {"num_groups": 4}
SIGNS = {"init": "rademacher", "vectors": "per_group", "num_groups": 4, "refresh_every": 7}
RUNNING = {"init": "running_average", "vectors": "per_group", "num_groups": 5}
# Adam divides the gradient of GPT-2's key biases, which is rounding alone, by its size: SGD there.
SETUPS = {
    "ddp": Setup(config=AVERAGE),
    "ddp-accumulated-clipped": Setup(config=SIGNS, accumulation=2, clip=0.5),
    "ddp-running": Setup(config=RUNNING),
    "ddp-svd": Setup(config={**AVERAGE, "init": "svd"}),
    "ddp-dense": Setup(config={**AVERAGE, "gradient": "dense"}),
    "ddp-sgd": Setup(config=SIGNS, optimizer="sgd", clip=0.5),
    "ddp-conv1d": Setup(config=RUNNING, family="gpt2", optimizer="sgd"),
    "ddp-lora": Setup("ddp", "lora", AVERAGE, accumulation=2, clip=0.5),
    "fsdp2": Setup("fsdp2", config=AVERAGE),
    "fsdp2-accumulated-clipped": Setup("fsdp2", config=SIGNS, accumulation=2, clip=0.5),
    "fsdp2-running": Setup("fsdp2", config=RUNNING),
    "fsdp2-dense": Setup("fsdp2", config={**AVERAGE, "gradient": "dense"}),
    "fsdp2-sgd": Setup("fsdp2", config=SIGNS, optimizer="sgd", clip=0.5),
    "fsdp2-every-3": Setup("fsdp2", config={**AVERAGE, "fold_every": 3}),
    "fsdp2-never-folded": Setup("fsdp2", config={**AVERAGE, "fold_every": None}),
    "fsdp2-conv1d": Setup("fsdp2", config=RUNNING, family="gpt2", optimizer="sgd"),
    "fsdp2-lora": Setup("fsdp2", "lora", AVERAGE, accumulation=2, clip=0.5),
}
SKIPPING = Setup(config=AVERAGE, family="experts")


OF_FOUR = ("ddp", "fsdp2-conv1d")
CASES = [*((2, name) for name in SETUPS), *((4, name) for name in OF_FOUR)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What each of so many ranks has at the end of each training; all trainings at once."""

    @functools.cache
    def by(count):
        setups = SETUPS if count == 2 else {name: SETUPS[name] for name in OF_FOUR}
        return on_ranks(count, train_all, tmp_path_factory.mktemp(f"ranks-{count}"), setups)

    return by


@pytest.fixture(scope="module")
def alone():
    return functools.cache(lambda name: train(SETUPS[name]))


@pytest.mark.parametrize(("count", "name"), CASES)
def test_ranks_train_as_one(trained, alone, count, name):
    expected, results = alone(name), [result[name] for result in trained(count)]
    for result in results:
        assert result.keys() == expected.keys()
        for key, tensor in expected.items():
            assert_close(result[key], tensor, 1e-10)
            assert_bitwise(result[key], results[0][key])


def test_ranks_that_skip_layers_hold_nobody_up(tmp_path):
    """Each rank's tokens go to another expert, and no token to the third."""
    alone = train(SKIPPING)
    results = on_ranks(2, train, tmp_path, SKIPPING)
    for key, expected in alone.items():
        if key != "experts.2.vectors":  # nobody's tokens: random where there are ranks
            assert_close(results[0][key], expected, 1e-10)
        assert_bitwise(results[0][key], results[1][key])
    weight = results[0]["experts.2.vectors"]
    assert_close(weight.norm(dim=1), torch.ones(len(weight)), 1e-6)
