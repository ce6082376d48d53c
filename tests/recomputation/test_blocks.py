"""Gradient checkpointing of every n-th block."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.recomputation import (
    checkpoint_blocks,
    checkpointable,
    recompute,
    recomputed,
    undo_recompute,
)

from .cases import assert_same, build, gradients, kept, kept_by

D, I, T = 8, 20, 5  # noqa: E741


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, I), nn.GELU(), nn.Linear(I, D)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.small = nn.Sequential(*(nn.Sequential(nn.Linear(1, 1)) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


@pytest.mark.parametrize(
    ("name", "lists"),
    [
        ("llama", ["model.layers"]),
        ("gpt2", ["transformer.h"]),
        ("bert", ["bert.encoder.layer"]),
        ("t5-relu", ["encoder.block", "decoder.block"]),
    ],
)
def test_checkpointable_blocks_of_transformers(name: str, lists: list[str]):
    model, _ = build(name)
    assert [name for name, _ in checkpointable(model)] == lists


def test_checkpointable_blocks():
    model = Net()
    assert [name for name, _ in checkpointable(model)] == ["blocks"]
    assert [name for name, _ in checkpointable(nn.ModuleDict({"a": model}))] == ["a.blocks"]
    assert [name for name, _ in checkpointable(nn.Sequential(Block(), Block()))] == [""]
    checkpoint_blocks(model, 2)
    assert [name for name, _ in checkpointable(model)] == ["blocks"]
    assert checkpointable(nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))) == []


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_saved(every: int):
    model = Net()
    x = torch.randn(T, D, requires_grad=True)
    own = [*model.parameters(), x]
    plain = model(x)
    plain.sum().backward()
    expected = [p.grad for p in model.blocks.parameters()]
    model.zero_grad()
    assert checkpoint_blocks(model, every) is model
    counted = kept(lambda: model(x), own)
    chosen = len(range(0, 4, every))
    assert counted["float32", T * I] == 2 * (4 - chosen)
    assert counted["float32", T * D] == 3  # the first block's input is x
    assert [recomputed(model).get(f"blocks.{i}") for i in range(4)] == [
        "checkpoint" if i % every == 0 else None for i in range(4)
    ]
    y = model(x)
    assert torch.equal(y, plain)
    y.sum().backward()
    for parameter, gradient in zip(model.blocks.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5-gated"])
@pytest.mark.parametrize("every", [1, 2])
def test_transformers(name: str, every: int):
    model, batch = build(name)
    if name != "vit":
        model.config.use_cache = False
    expected, before = gradients(model, batch), kept_by(model, batch)
    attributes = [sorted(vars(module)) for module in model.modules()]
    checkpoint_blocks(model, every)
    after = kept_by(model, batch)
    assert _large(after) < _large(before)
    assert_same(gradients(model, batch), expected)
    kinds = Counter(recomputed(model).values())
    assert kinds == {"checkpoint": (4 if name.startswith("t5") else 2) // every}
    twin = pickle.loads(pickle.dumps(model))
    assert kept_by(twin, batch) == after
    for undone in (undo_recompute(model), undo_recompute(twin)):
        assert recomputed(undone) == {}
        assert kept_by(undone, batch) == before
    assert [sorted(vars(module)) for module in model.modules()] == attributes


def _large(counted: Counter[tuple[str, int]]) -> int:
    return sum(numbers * count for (_, numbers), count in counted.items())


@pytest.mark.filterwarnings("ignore:VeLoRA. compressing these layers frees no")
def test_with_everything():
    model, batch = build("llama")
    model.config.use_cache = False
    config = VeloraConfig(num_groups=4, init="random")
    twin = velora_torch.compress(copy.deepcopy(model), config)
    expected = gradients(twin, batch)
    velora_torch.compress(checkpoint_blocks(recompute(model, loss=False), 2), config)
    assert_same(gradients(model, batch), expected)
    velora_torch.restore(model)
    assert recomputed(model) == {}


def test_evaluation_is_not_checkpointed():
    model = checkpoint_blocks(Net()).eval()
    x = torch.randn(T, D, requires_grad=True)
    counted = kept(lambda: model(x), [*model.parameters(), x])
    assert counted["float32", T * I] == 8


def test_again_with_another_distance():
    model = checkpoint_blocks(checkpoint_blocks(Net(), 1), 3)
    assert list(recomputed(model)) == ["blocks.0", "blocks.3"]
    assert all(type(block) is Block for block in undo_recompute(model).blocks)


def test_users_own_checkpointing_comes_back():
    model, batch = build("llama")
    model.config.use_cache = False
    model.activation_checkpointing_enable()
    before = kept_by(model, batch)
    checkpoint_blocks(model, 2)
    assert kept_by(model, batch) != before
    undo_recompute(model)
    assert kept_by(model, batch) == before


@pytest.mark.parametrize("every", [0, -1, 5, 1.0, True, "2"])
def test_distances_that_make_no_sense(every: object):
    with pytest.raises(ValueError, match="from 1 to 4"):
        checkpoint_blocks(Net(), every)  # type: ignore[arg-type]


def test_no_blocks():
    with pytest.raises(ValueError, match="nothing to"):
        checkpoint_blocks(nn.Sequential(nn.Linear(D, D), nn.ReLU()))
