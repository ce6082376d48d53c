"""Checkpoints in shards that are not what a model wants."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

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
