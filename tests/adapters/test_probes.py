"""Heads are found, and probes train what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from velora_torch.adapters import bitfit, find_head, linear_probe

from ..tiny_models import Net, llama, loss_of, net, train, vit
from .models import CASES, Case, build, classifier_bert, dinov2, timm_vit, trains


@pytest.mark.parametrize("case", CASES)
def test_heads_are_found(case: Case):
    assert find_head(case[0]()) == case[2]


def test_a_head_of_several_layers():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = dinov2().dinov2
            self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3))

    assert find_head(Model()) == ["head"]


def test_heads_inside_of_a_wrapper():
    wrapper = nn.ModuleDict({"model": vit()})
    assert find_head(wrapper) == ["model.classifier"]


def test_a_model_without_a_head_says_what_there_is():
    with pytest.raises(ValueError, match=r"Dinov2Model has no head .*head=\[\].*layernorm"):
        find_head(dinov2().dinov2)
    timm_model = timm_vit()
    timm_model.reset_classifier(0)
    with pytest.raises(ValueError, match="VisionTransformer has no head"):
        find_head(timm_model)


@pytest.mark.parametrize("case", CASES)
def test_linear_probe_trains_the_head(case: Case):
    model = linear_probe(build(case))
    head = set(model.get_submodule(case[2][0]).parameters())
    assert {p for p in model.parameters() if p.requires_grad} == head
    batch = case[1]()
    before = loss_of(model, batch).item()
    train(model, [batch] * 3, torch.optim.AdamW)
    assert loss_of(model, batch).item() < before


def test_linear_probe_of_named_layers():
    assert trains(linear_probe(net(), head=["second"])) == {"second.weight", "second.bias"}
    with pytest.raises(ValueError, match=r"head=\[\] names none"):
        linear_probe(net(), head=[])
    with pytest.raises(ValueError, match="no parameters to train"):
        linear_probe(nn.Sequential(nn.Linear(2, 2), nn.GELU()), head=["1"])


@pytest.mark.parametrize("make", [vit, dinov2, timm_vit, classifier_bert])
def test_bitfit_trains_biases_and_the_head(make: Any):
    model = bitfit(make())
    (head,) = find_head(model)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert len(biases) > 10
    assert trains(model) == biases | {f"{head}.weight"}


def test_bitfit_of_attention_with_one_bias_for_three():
    model = bitfit(nn.MultiheadAttention(8, 2), head=[])
    assert trains(model) == {"in_proj_bias", "out_proj.bias"}


def test_bitfit_without_biases():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no biases"):
        bitfit(llama())


@pytest.mark.parametrize("probe", [linear_probe, bitfit])
def test_a_refusal_changes_nothing(probe: Any):
    model = Net()
    with pytest.raises(ValueError, match="no head"):
        probe(model)
    assert all(p.requires_grad for p in model.parameters())
