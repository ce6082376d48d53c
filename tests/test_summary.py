"""The summary: right numbers, a table that a person can read, and no error on any model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from velora_torch import VeloraConfig, compress, recompute, restore, summary
from velora_torch.overview import LayerSummary

from .tiny_models import batches, gpt2, llama, net, train

CONFIG = VeloraConfig(num_groups=4)


def test_numbers_of_a_factored_layer() -> None:
    found = summary(compress(net(), CONFIG))
    assert list(found.compressed) == ["first", "second"]
    assert found.compressed["first"] == LayerSummary(
        outputs=32,
        features=16,
        groups=4,
        size=4,
        gradient="factored",
        weights=512,
        trainable=128,
        pending=False,
    )
    assert found.exact == {"norm": "LayerNorm is not a linear layer"}


def test_numbers_of_a_dense_layer() -> None:
    model = compress(net(), VeloraConfig(sub_token_size=5, gradient="dense"))
    layer = summary(model).compressed["first"]
    assert (layer.groups, layer.size, layer.gradient) == (4, 5, "dense")
    assert layer.weights == layer.trainable == 512


def test_numbers_of_a_transposed_layer() -> None:
    layer = summary(compress(gpt2(), CONFIG)).compressed["transformer.h.0.mlp.c_fc"]
    assert (layer.outputs, layer.features, layer.trainable) == (128, 32, 512)


def test_pending_coefficients_are_seen() -> None:
    model = compress(net(), VeloraConfig(num_groups=4, fold_every=None))
    train(model, batches(1))
    assert summary(model).compressed["first"].pending


@pytest.mark.filterwarnings("ignore:VeLoRA. compressing these layers frees no:UserWarning")
def test_the_table_of_a_language_model() -> None:
    model = compress(llama(), VeloraConfig(targets=["v_proj", "down_proj"], num_groups=4))
    assert str(summary(model)).splitlines() == [
        "4 layers compressed: 3,584 weights are trained by 384 numbers",
        "     2 x v_proj  32 -> 16  4 groups of 8",
        "     2 x down_proj  40 -> 32  4 groups of 10",
        "17 layers exact",
        "     1 x embed_tokens: Embedding is not a linear layer",
        "     2 x q_proj: not in targets",
        "     2 x k_proj: not in targets",
        "     2 x o_proj: not in targets",
        "     2 x gate_proj: not in targets",
        "     2 x up_proj: not in targets",
        "     2 x input_layernorm: LlamaRMSNorm is not a linear layer",
        "     2 x post_attention_layernorm: LlamaRMSNorm is not a linear layer",
        "     1 x norm: LlamaRMSNorm is not a linear layer",
        "     1 x lm_head: not in targets",
    ]


def test_a_plain_model_has_a_summary_too() -> None:
    model = net(width=64)
    found = summary(model)
    assert not found.compressed
    assert found.exact == {
        "first": "the model is not compressed",
        "norm": "LayerNorm is not a linear layer",
        "second": "the model is not compressed",
    }
    assert str(found).startswith("0 layers compressed: 0 weights are trained by 0 numbers\n")
    assert summary(restore(compress(model, CONFIG))) == found


def test_a_model_without_parameters() -> None:
    assert str(summary(nn.ReLU())).splitlines()[-1] == "0 layers exact"


def test_the_root_module_has_a_name() -> None:
    assert "1 x (root): the model is not compressed" in str(summary(nn.Linear(64, 2)))
    assert "1 x (root)  64 -> 2  4 groups of 16" in str(summary(compress(nn.Linear(64, 2), CONFIG)))


def test_layers_that_came_later_are_named_so() -> None:
    model = compress(net(), CONFIG)
    model.second = nn.Linear(32, 9)
    assert summary(model).exact["second"] == "added after the model was compressed"


def test_a_model_that_was_renamed_or_cut_since() -> None:
    model = compress(net(), VeloraConfig(targets="first|second", num_groups=4))
    found = summary(nn.Sequential(model))
    assert list(found.compressed) == ["0.first", "0.second"]
    model.second = nn.Identity()
    assert list(summary(model).compressed) == ["first"]


def test_summary_moves_nothing() -> None:
    model = compress(net(), VeloraConfig(num_groups=4, fold_every=3))
    train(model, batches(1))
    before = {key: value.clone() for key, value in model.named_parameters()}
    str(summary(model))
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())


class Elsewhere(nn.Module):
    """Multiplies by the weight of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


def test_layers_that_others_compute_with_are_named_after_a_step() -> None:
    model = compress(Elsewhere(), CONFIG)
    line = "     1 x read: not called in training so far: where other code uses its weight"
    assert line not in str(summary(model))
    before = model.read.weight.detach().clone()
    train(model, batches(1))
    found = summary(model)
    assert {name for name, layer in found.compressed.items() if layer.uncalled} == {"read"}
    assert line in str(found)
    assert not torch.equal(model.read.weight, before), "trains all the same"
    assert line not in str(summary(restore(model)))


def test_recomputed_modules_go_by_their_own_names() -> None:
    model = compress(llama(), CONFIG)
    recompute(model)
    found = summary(model).exact
    assert "is not a linear layer" in found["model.norm"]
    assert "Recomputed" not in found["model.norm"]
    assert found["lm_head"] == "chunked loss: to compress it too, do so before recompute"
