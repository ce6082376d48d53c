"""DeepSpeed's ZeRO is refused before it has changed a parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import velora_torch as velora
from tests.closeness import assert_bitwise
from velora_torch.integrations.deepspeed import check_launch


def zero(model, mark):
    """What ZeRO does to a model: marks its parameters, and steps a flat copy of them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        setattr(parameter, mark, None)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in trained]))
    flat.grad = torch.cat([p.grad.flatten() for p in trained])
    return flat, torch.optim.AdamW([flat], lr=0.1)


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
@pytest.mark.parametrize("gradient", ["factored", "dense"])
def test_flat_copies_are_not_stepped(gradient, mark):
    config = velora.VeloraConfig(num_groups=2, gradient=gradient, targets=["0"])
    model = velora.compress(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), config)
    model(torch.randn(3, 8)).square().sum().backward()
    flat, optimizer = zero(model, mark)
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match=r"ZeRO trains layer '0'.*--strategy fsdp2"):
        optimizer.step()
    assert_bitwise(flat.detach(), before)
    for parameter in model.parameters():
        parameter.__dict__.pop(mark, None)


def test_plain_models_are_nobodys_affair():
    config = velora.VeloraConfig(num_groups=2, targets=["0"])
    model = velora.restore(velora.compress(nn.Sequential(nn.Linear(8, 4)), config))
    model(torch.randn(3, 8)).square().sum().backward()
    flat, optimizer = zero(model, "_hp_mapping")
    before = flat.detach().clone()
    optimizer.step()
    assert (flat.detach() - before).abs().max() > 0.05


@pytest.mark.parametrize("value", ["true", "1"])
def test_processes_started_for_deepspeed_are_refused(monkeypatch, value):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", value)
    with pytest.raises(ValueError, match="ACCELERATE_USE_DEEPSPEED"):
        check_launch()


def test_other_processes_are_not(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    check_launch()
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    check_launch()
