"""Adapters saved alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.adapters import (
    adapter_state_dict,
    add_hydra,
    add_ssf,
    bitfit,
    linear_probe,
    load_adapter_state_dict,
)

from ..closeness import assert_bitwise, assert_close
from ..tiny_models import net, train
from .models import CASES, Case, build, disturb, output, trains

METHODS = [
    pytest.param(add_ssf, id="ssf"),
    pytest.param(add_hydra, id="hydra"),
    pytest.param(linear_probe, id="linear-probe"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded(tmp_path: Path, case: Case, method: Any):
    model = method(build(case))
    disturb(model)
    state = adapter_state_dict(model)
    assert set(state) == trains(model)
    save_file(state, tmp_path / "adapters.safetensors")
    torch.manual_seed(7)  # other scales and branches to start with
    other = method(build(case))
    load_adapter_state_dict(other, load_file(tmp_path / "adapters.safetensors"))
    assert_bitwise(output(other, case[1]()), output(model, case[1]()))


def test_biases():
    model = bitfit(net(), head=["second"])
    assert set(adapter_state_dict(model)) == trains(model)


@pytest.mark.parametrize(
    ("add", "targets"), [(add_ssf, ("ssf",)), (add_hydra, ("hydra_A",)), (add_ssf, "all-linear")]
)
@pytest.mark.parametrize("fold_every", [1, None], ids=["folded", "pending"])
def test_of_a_compressed_model(add: Any, targets: Any, fold_every: int | None):
    """As if it had been restored: coefficients are in the weights."""
    model = add(net(dtype=torch.float64), head=["second"])
    names = trains(model)
    velora_torch.compress(model, VeloraConfig(targets=targets, num_groups=4, fold_every=fold_every))
    x = torch.randn(5, 16, dtype=torch.float64)
    train(model, [x, x])
    state = adapter_state_dict(model)
    assert set(state) == names
    other = add(net(dtype=torch.float64), head=["second"])
    load_adapter_state_dict(other, state)
    assert_close(other(x), model(x), 1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"method": add_ssf}, "4 tensors of the model are missing.*4 are not", id="method"
        ),
        pytest.param({"rank": 3}, r"has shape \(4, 16\), and the model's has \(3, 16\)", id="rank"),
        pytest.param({"head": []}, "such as 'second", id="head"),
    ],
)
def test_other_adapters_are_refused(settings: dict[str, Any], message: str):
    saved = adapter_state_dict(add_hydra(net(), rank=4, head=["second"]))
    method, options = settings.get("method", add_hydra), dict(settings)
    options.pop("method", None)
    model = method(net(), **({"head": ["second"]} | options))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_adapter_state_dict(model, saved)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_to_save():
    with pytest.raises(ValueError, match="nothing trains"):
        adapter_state_dict(net().requires_grad_(False))
