"""The arithmetic of ranks: shards of odd numbers of rows, units, and what is on its way."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from velora_torch import VeloraConfig
from velora_torch.memory.planner.plan import plan
from velora_torch.memory.planner.predictor import Predictor, Size
from velora_torch.memory.planner.ranks import Held, Layout, Ranks, rounded, shard_rows
from velora_torch.memory.simulator.architecture import resolve
from velora_torch.memory.simulator.setup import Setup

from ... import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

SIZE = Size(2, 16)
COMPRESSED = VeloraConfig(num_groups=2, init="random", vectors="per_group")


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 12, 13])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_rows_are_cut_as_torch_cuts_them(rows: int, ranks: int):
    chunks = torch.empty(rows).chunk(ranks)
    expected = [len(chunk) for chunk in chunks] + [0] * (ranks - len(chunks))
    assert [shard_rows(rows, ranks, rank) for rank in range(ranks)] == expected


def test_a_shard_is_padded_by_rows():
    held = Held((7, 3), torch.float32, True)
    assert held.nbytes() == 7 * 3 * 4
    assert held.nbytes(2) == 4 * 3 * 4
    assert held.shard(2, 1) == (3, 3)
    assert held.nbytes(16) == 3 * 4
    assert Held((7,), torch.bfloat16, True).nbytes(4) == 2 * 2
    assert rounded(513) == 2 * rounded(1)


class Tied(nn.Module):
    """An embedding that is the head, a norm before and one behind two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.early = nn.LayerNorm(4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.norm = nn.LayerNorm(4, bias=False)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.blocks[1][0].bias.requires_grad_(False)


def test_units_are_the_root_and_its_blocks():
    layout = Layout.of(Tied())
    assert [(held.shape, held.late) for held in layout.root] == [
        ((11, 4), True),
        ((4,), False),
        ((4,), False),
        ((4,), True),
    ]
    assert [[held.trained for held in unit] for unit in layout.blocks] == [
        [True, True],
        [True, False],
    ]
    assert layout.weights(3) == 8 * rounded(1)
    assert layout.gradients(3) == 3 * rounded(1)  # one storage for each unit


def test_gradients_of_a_unit_are_rounded_together():
    net = nn.Sequential(*(nn.Linear(64, 5) for _ in range(3)))
    whole = 3 * (5 * 64 + 5) * 4
    assert Layout.of(net).gradients() == rounded(whole)
    assert Layout.of(net).gradients(2) == rounded(3 * (3 * 64 + 3) * 4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_sample_of_blocks_shows_the_whole_layout(method: str):
    if method == "lora":
        pytest.importorskip("peft")
    setup = Setup(method=method, velora=COMPRESSED)  # type: ignore[arg-type]
    predictor = Predictor(resolve(tiny_models.llama(layers=4)), "float32", "cpu")
    (cut,) = {predictor.layout(setup)}
    predictor.architecture.depth = None
    predictor._layouts.clear()
    assert predictor.layout(setup) == cut
    assert len(cut.blocks) == 4


@pytest.fixture(scope="module")
def alone() -> Predictor:
    return Predictor(resolve(tiny_models.llama(layers=2)), "float32", "cpu")


def predicted(alone: Predictor, count: int, strategy: str, setup: Setup) -> Any:
    """What is simulated is the same for any number of ranks."""
    return replace(alone, ranks=Ranks(count, strategy), _turned={}).predict(setup, SIZE)


def test_ddp_holds_buckets_in_every_moment(alone: Predictor):
    setup = Setup(optimizer="adamw", velora=COMPRESSED)
    one, several = (predicted(alone, n, "ddp", setup) for n in (1, 4))
    assert several.exchanged == one.gradients
    for name, total in one.segments.items():
        assert several.segments[name] == total + one.gradients
    for name in ("weights", "gradients", "optimizer_state", "saved", "peak_at"):
        assert getattr(several, name) == getattr(one, name)


@pytest.mark.parametrize("velora", [None, COMPRESSED])
def test_more_ranks_hold_less_each(alone: Predictor, velora: Any):
    setup = Setup(optimizer="adamw", velora=velora)
    found = [predicted(alone, 1, "ddp", setup)]
    found += [predicted(alone, n, "fsdp2", setup) for n in (2, 3, 8)]
    for before, after in itertools.pairwise(found):
        for name in ("weights", "gradients", "optimizer_state"):
            assert getattr(after, name) < getattr(before, name), name
        assert after.saved == before.saved
    for simulation in found:
        assert simulation.peak_bytes == sum(simulation.peak.values())
        assert simulation.peak_bytes == max(simulation.segments.values())


def test_a_plan_of_shards_fits_where_the_whole_does_not():
    model = tiny_models.llama(layers=2)
    choices: dict[str, Any] = {"batch": 1, "seq": 8, "dtype": "float32", "device": "cpu"}
    choices |= {"velora": None, "optimizer": "adamw", "recompute": False, "chunked_loss": False}
    choices |= {"checkpoint_every": None}
    whole = plan(model, budget="1GiB", **choices)
    shards = plan(model, budget="1GiB", gpus=8, strategy="fsdp2", **choices)
    budget = shards.candidates[0].peak_bytes
    assert budget < min(candidate.peak_bytes for candidate in whole.candidates)
    fitting = plan(model, budget=budget, gpus=8, strategy="fsdp2", **choices)
    assert [c.peak_bytes <= budget for c in fitting.candidates] == [True] * len(fitting.candidates)
    assert fitting.candidates
    assert shards.weights_bytes < whole.weights_bytes
    told = shards.candidates[0].to_dict()
    assert (told["gpus"], told["strategy"]) == (8, "fsdp2")
    with pytest.raises(ValueError, match=r"on each rank.*or more GPUs"):
        plan(model, budget=shards.weights_bytes - 1, gpus=8, strategy="fsdp2", **choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"gpus": 0}, "gpus must be a number of at least 1, got 0"),
        ({"gpus": True}, "gpus must be a number of at least 1, got True"),
        ({"gpus": 2, "strategy": "zero"}, "unknown strategy 'zero': choose one of ddp, fsdp2"),
        ({"strategy": "fsdp2"}, r"gpus is 1: give a larger number \(--gpus 2\)"),
        ({"gpus": 2, "strategy": "fsdp2", "method": "qlora"}, "Choose method lora, or strategy"),
        (
            {"gpus": 2, "strategy": "fsdp2", "optimizers": ["galore_adamw"]},
            "Choose another optimizer",
        ),
        ({"gpus": 2, "strategy": "fsdp2", "optimizer": "galore_adamw"}, "whole gradients"),
        ({"gpus": 2, "strategy": "fsdp2", "optimizer": "adamw_8bit"}, "states have no rows"),
    ],
)
def test_what_ranks_there_are_not(choices: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan("llama-7b", budget="24GiB", **choices)
