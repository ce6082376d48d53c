"""Checkpoints in shards: what comes back on how many ranks, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.closeness import assert_bitwise
from tests.distributed.launch import on_ranks
from tests.distributed.training import Setup, batches, build, distribute, full, make_optimizer
from velora_torch.checkpoint import load_state, save_state
from velora_torch.integrations import sharded_checkpoint
from velora_torch.integrations.sharded_checkpoint import (
    FOLDER,
    JSON_FILE,
    ShardedState,
    check_available,
    has_shards,
    load_model,
    save_shards,
    whole_weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*coordinator"),
]


DENSE = {"gradient": "dense"}
SETUPS = {
    "llama-float64": Setup(config={"num_groups": 4}),
    "llama-float32-late-folds": Setup(
        config={"num_groups": 4, "fold_every": 3}, dtype=torch.float32, optimizer="sgd"
    ),
    "llama-bfloat16": Setup(config={"num_groups": 4, **DENSE}, dtype=torch.bfloat16),
    "gpt2-float32": Setup(config={"num_groups": 2}, family="gpt2", dtype=torch.float32),
    "gpt2-bfloat16": Setup(
        config={"num_groups": 5, "init": "random", **DENSE}, family="gpt2", dtype=torch.bfloat16
    ),
    "experts-float64": Setup(config={"num_groups": 3}, family="experts", optimizer="sgd"),
}
"""Attention, Conv1D with tied weights, experts; widths that no number of ranks divides."""


def everything(model, optimizer):
    """All that a checkpoint has to bring back, whole."""
    found = {f"weights/{name}": full(t) for name, t in model.state_dict().items()}
    found |= {f"parts/{name}": full(t) for name, t in model.named_parameters()}
    found |= {f"parts/{name}": full(t) for name, t in model.named_buffers()}
    for number, entries in optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{number}/{key}": full(value) for key, value in entries.items()}
    return found


def prepared(setup, folder=None):
    """A model on this rank, and its optimizer; from a checkpoint, if there is one."""
    several = torch.distributed.is_initialized()
    model = build(setup)
    if folder is not None:
        load_model(folder, model)
        load_state(model, folder)
    wrapped = distribute(model, "fsdp2") if several else model
    optimizer = make_optimizer(setup, [p for p in model.parameters() if p.requires_grad])
    if folder is not None:
        ShardedState(optimizer, folder).load_state_dict({})
    return model, wrapped, optimizer


def written(folder):
    """Train two steps of each set-up on this rank, and write checkpoints."""
    told, rank, ranks = {}, torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, setup in SETUPS.items():
        model, wrapped, optimizer = prepared(setup)
        for step in batches(setup)[:2]:
            mine = step[0][rank::ranks]  # FSDP2 wants every rank to reach every expert in use
            wrapped(input_ids=mine, labels=mine).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        save_shards(folder / name, model, optimizer, write=rank == 0)
        save_state(model, folder / name)
        torch.distributed.barrier()
        told[name] = everything(model, optimizer)
    return told


def read(folder):
    """What each checkpoint gives this rank."""
    loaded = {name: prepared(setup, folder / name) for name, setup in SETUPS.items()}
    return {name: everything(model, optimizer) for name, (model, _, optimizer) in loaded.items()}


def test_the_bits_come_back_on_any_number_of_ranks(tmp_path):
    """Written by four, of which one has no rows of the smallest layers; read by one and by two."""
    folder = tmp_path / "checkpoints"
    first, *others = on_ranks(4, written, tmp_path / "write", folder)
    assert any(name.startswith("optimizer/") for name in first["llama-float64"])
    found = [*others, read(folder), *on_ranks(2, read, tmp_path / "read", folder)]
    for told in found:
        assert told.keys() == SETUPS.keys()
        for name, expected in first.items():
            assert told[name].keys() == expected.keys()
            for key, tensor in expected.items():
                assert_bitwise(told[name][key], tensor)


def stepped(widths=(5, 3), optimizer=torch.optim.AdamW):
    """A model with tied weights, and its optimizer after a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, widths[0]), nn.Linear(widths[0], widths[1]))
    model.add_module("tied", nn.Linear(4, widths[0]))
    model.tied.weight = model[0].weight
    optimizer = optimizer([{"params": [p], "lr": 0.1} for p in model.parameters()])
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def folder(tmp_path):
    model, optimizer = stepped()
    save_shards(tmp_path, model, optimizer, write=True)
    assert has_shards(tmp_path)
    return tmp_path


def test_everything_comes_back(folder):
    expected, there = stepped()
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model.add_module("tied", nn.Linear(4, 5))
    model.tied.weight = model[0].weight
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    load_model(folder, model)
    ShardedState(optimizer, folder).load_state_dict({})
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert model.tied.weight is model[0].weight
    found, wanted = optimizer.state_dict(), there.state_dict()
    assert found["param_groups"] == json.loads(json.dumps(wanted["param_groups"]))
    assert found["state"].keys() == wanted["state"].keys()
    for number, entries in wanted["state"].items():
        assert found["state"][number].keys() == entries.keys()
        for key, value in entries.items():
            assert torch.equal(found["state"][number][key], value)
    weights = whole_weights(folder)
    assert "tied.weight" not in weights
    assert torch.equal(weights["1.bias"], expected[1].bias)


def test_another_model_is_refused_and_untouched(folder):
    model, optimizer = stepped((6, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another model: 4 weights .* such as 0\.bias"):
        load_model(folder, model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="another number of parameters"):
        ShardedState(optimizer, folder).load_state_dict({})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "velora-torch/shards/1"}'])
def test_a_damaged_description_is_named(folder, text):
    (folder / FOLDER / JSON_FILE).write_text(text)
    _, optimizer = stepped()
    with pytest.raises(ValueError, match=r"optimizer\.json is damaged"):
        ShardedState(optimizer, folder).load_state_dict({})


def test_a_newer_format_is_named(folder):
    path = folder / FOLDER / JSON_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "velora-torch/shards/2"}))
    _, optimizer = stepped()
    with pytest.raises(ValueError, match=r"format 'velora-torch/shards/2'; this version reads"):
        ShardedState(optimizer, folder).load_state_dict({})


def test_states_that_are_no_tensors_are_refused(tmp_path):
    model, optimizer = stepped(optimizer=torch.optim.SGD)
    optimizer.state[model[1].bias]["projector"] = object()
    with pytest.raises(ValueError, match="keeps a object as 'projector'"):
        save_shards(tmp_path, model, optimizer, write=True)
    assert not (tmp_path / FOLDER).exists()


def test_numbers_come_back(tmp_path):
    model, optimizer = stepped(optimizer=torch.optim.SGD)
    optimizer.state[model[1].bias]["seen"] = 3
    save_shards(tmp_path, model, optimizer, write=True)
    _, fresh = stepped(optimizer=torch.optim.SGD)
    ShardedState(fresh, tmp_path).load_state_dict({})
    parameter = fresh.param_groups[3]["params"][0]
    assert fresh.state[parameter] == {"seen": 3}


def test_an_old_pytorch_is_named_early(monkeypatch):
    check_available()
    monkeypatch.setattr(
        sharded_checkpoint.inspect, "signature", lambda kind: SimpleNamespace(parameters=())
    )
    with pytest.raises(ValueError, match="leave it out: checkpoints hold whole tensors"):
        check_available()
