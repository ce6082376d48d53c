"""Merged adapters: the same outputs from a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.adapters import add_hydra, add_ssf, merge_adapters

from ..closeness import assert_close
from ..tiny_models import Net, image_batch, llama, net, token_batch, train, vit
from .models import CASES, Case, build, disturb, output

METHODS = [pytest.param(add_ssf, id="ssf"), pytest.param(add_hydra, id="hydra")]


@pytest.mark.parametrize("add", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_stay_and_the_model_is_plain(case: Case, add: Any):
    model = build(case)
    plain = {n: (type(m), set(m.state_dict())) for n, m in model.named_modules()}
    add(model)
    disturb(model)
    y = output(model, case[1]())
    assert merge_adapters(model) is model
    assert {n: (type(m), set(m.state_dict())) for n, m in model.named_modules()} == plain
    assert_close(output(model, case[1]()), y, 1e-10)


@pytest.mark.parametrize("add", METHODS)
def test_a_merged_model_is_a_plain_checkpoint(tmp_path: Path, add: Any):
    model = add(vit())
    disturb(model)
    y = output(model, image_batch())
    merge_adapters(model).save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert_close(output(again.eval(), image_batch()), y, 1e-5)


class Shifted(nn.Module):
    """A norm whose weight is kept around zero."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class ShiftedNorm(Shifted):
    """So called."""


class ExponentNorm(Shifted):
    """Its scale is no linear function of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.exp()


class GatedNorm(Shifted):
    """It takes two inputs."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            raise TypeError("missing gate")
        return x * gate * self.weight


def test_a_norm_whose_weight_is_kept_around_zero():
    model = nn.Sequential(nn.Linear(6, 8), ShiftedNorm(8)).double()
    add_ssf(model, head=[])
    x = torch.randn(3, 6, dtype=torch.float64)
    y = model(x)
    assert_close(merge_adapters(model)(x), y, 1e-12)


@pytest.mark.parametrize("kind", [ExponentNorm, GatedNorm])
def test_a_norm_that_cannot_be_merged(kind: type[Shifted]):
    model = add_ssf(nn.Sequential(nn.Linear(6, 8), kind(8)), head=[])
    with pytest.raises(ValueError, match=r"SSF adapter of '1' cannot be merged.*out of targets"):
        merge_adapters(model)


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 6, 2), nn.Conv2d(3, 6, 2), nn.Conv3d(3, 6, 2)])
def test_convolutions(layer: nn.Module):
    model = add_ssf(nn.Sequential(layer).double(), head=[])
    x = torch.randn(2, 3, *[4] * len(layer.kernel_size), dtype=torch.float64)  # type: ignore[arg-type]
    y = model(x)
    assert_close(merge_adapters(model)(x), y, 1e-12)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.GroupNorm(2, 6)], ids=["batch", "group"])
def test_norms_of_channels(norm: nn.Module):
    model = add_ssf(nn.Sequential(norm).double().eval(), head=[])
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    y = model(x)
    assert_close(merge_adapters(model)(x), y, 1e-12)


def test_a_shift_without_a_bias_to_take_it():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 2, bias=False)).double()
    add_ssf(model, head=[], shift=True)
    with pytest.raises(ValueError, match=r"shift of '0' cannot be merged.*add_bias=True"):
        merge_adapters(model)
    x = torch.randn(3, 6, dtype=torch.float64)
    y = model(x)
    merge_adapters(model, add_bias=True)
    assert type(model[0]) is nn.Linear
    assert model[0].bias is not None
    assert not model[0].bias.requires_grad
    assert_close(model(x), y, 1e-12)


def test_a_norm_without_a_bias_takes_no_shift():
    model = add_ssf(nn.Sequential(nn.RMSNorm(6)), head=[], shift=True)
    with pytest.raises(ValueError, match=r"RMSNorm has no bias: add adapters without shifts"):
        merge_adapters(model, add_bias=True)


@pytest.mark.parametrize("add", METHODS)
def test_shared_weights(add: Any):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    add(model, head=[])
    with pytest.raises(ValueError, match=r"shared with '1.weight'"):
        merge_adapters(model)


@pytest.mark.parametrize("add", METHODS)
def test_a_refusal_changes_nothing(add: Any):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model[2].weight = model[1].weight
    add(model, head=[])
    disturb(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="shared"):
        merge_adapters(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_there_is_nothing_to_merge():
    with pytest.raises(ValueError, match="no SSF or Hydra adapters"):
        merge_adapters(net())


@pytest.mark.parametrize("add", METHODS)
def test_a_quantised_base(add: Any):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    model = nn.Sequential(layer).to("cpu")
    x = torch.randn(3, 64)
    y = model(x).detach()
    add(model, head=[])
    if add is add_hydra:
        assert_close(model(x), y, 1e-6)
    else:
        assert not torch.equal(model(x), y)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"quantised weight.*adapter_state_dict.*dequantize"):
        merge_adapters(model)


@pytest.mark.parametrize("targets", ["ssf", "hydra_A"])
def test_a_compressed_model_is_restored_first(targets: str):
    model = net(dtype=torch.float64)
    if targets == "ssf":
        add_ssf(model, head=["second"])
    else:
        add_hydra(model, targets=["first"], head=["second"])
    config = VeloraConfig(targets=[targets], num_groups=4, fold_every=None)
    velora_torch.compress(model, config)
    x = torch.randn(5, 16, dtype=torch.float64)
    train(model, [x, x])
    y = model(x)
    with pytest.raises(ValueError, match=r"velora_torch.restore\(model\), which folds them"):
        merge_adapters(model)
    assert_close(model(x), y, 1e-12)
    merge_adapters(velora_torch.restore(model))
    assert {type(m) for m in model.modules()} == {Net, nn.Linear, nn.LayerNorm}
    assert_close(model(x), y, 1e-10)


def test_scales_alone_merge_into_a_language_model():
    model = add_ssf(llama())
    disturb(model)
    y = output(model, token_batch())
    assert_close(output(merge_adapters(model), token_batch()), y, 1e-5)
