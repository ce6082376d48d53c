"""What is captured of a layer gives its weight gradient, as autograd computes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny_models
from tests.closeness import assert_close
from velora_torch import VeloraConfig
from velora_torch.analysis.capture import Capture
from velora_torch.selection import select

LORA = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.default"


class Kept:
    """A capture of all layers of a model that keeps what it is given."""

    def __init__(self, model, layers=None, tokens=10**6, seed=0):
        if layers is None:
            chosen = select(model, VeloraConfig(num_groups=1)).chosen
            layers = {layer.name: layer.module for layer in chosen}
        self.samples, self.means, self.order = {}, {}, []
        self.layers = layers
        self.capture = Capture(model, layers, tokens, seed, self.on_mean, self.on_sample)

    def on_mean(self, name, mean_D):
        self.means.setdefault(name, []).append(mean_D)
        self.order.append(("mean", name))

    def on_sample(self, captured):
        assert captured.name not in self.samples
        self.samples[captured.name] = captured
        self.order.append(("sample", captured.name))

    def step(self, model, batches, sample=True, number=0):
        with self.capture as capture:
            capture.begin(number, len(batches), sample)
            for batch in batches:
                tiny_models.loss_of(model, batch).backward()
            capture.finish()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_dY_times_x_is_autograd_s_gradient(name):
    pytest.importorskip("transformers")
    make, batch = tiny_models.MODELS[name]
    model = make().train()
    kept = Kept(model)
    kept.step(model, [batch(0)])
    assert kept.samples.keys() == kept.layers.keys()
    assert len(kept.samples) >= 8
    for layer, captured in kept.samples.items():
        weight = kept.layers[layer].weight
        conv1d = type(kept.layers[layer]).__name__ == "Conv1D"
        dW = captured.dY_TO.T @ captured.x_TD
        assert_close(dW.T if conv1d else dW, weight.grad, 1e-5)
        assert captured.tokens == len(captured.x_TD)
        assert_close(kept.means[layer][0], captured.x_TD.mean(dim=0), 1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_an_adapter_s_gradient():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(tiny_models.llama(), config).train()
    torch.nn.init.normal_(model.get_submodule(LORA.format("B")).weight)
    kept = Kept(model)
    kept.step(model, [tiny_models.token_batch()])
    captured = kept.samples[LORA.format("A")]
    weight = kept.layers[LORA.format("A")].weight
    assert_close(captured.dY_TO.T @ captured.x_TD, weight.grad, 1e-5)


def test_gradients_of_accumulated_passes_add_up():
    net = tiny_models.net()
    kept = Kept(net)
    kept.step(net, tiny_models.batches(3))
    for name, captured in kept.samples.items():
        assert_close(captured.dY_TO.T @ captured.x_TD, kept.layers[name].weight.grad, 1e-5)
        assert captured.tokens == 15
    assert len(kept.means["first"]) == 1  # of the first pass


def test_samples_are_handed_over_while_the_backward_pass_goes_on():
    net = tiny_models.net()
    kept = Kept(net)
    seen = []
    net.first.weight.register_post_accumulate_grad_hook(lambda p: seen.append(list(kept.order)))
    kept.step(net, tiny_models.batches(1))
    assert ("sample", "second") in seen[0]
    assert kept.order == [
        ("mean", "first"),
        ("mean", "second"),
        ("sample", "second"),
        ("sample", "first"),
    ]


def test_a_sample_is_seeded_bounded_and_of_the_same_tokens():
    x = torch.randn(40, 16)

    def sample(seed, number=0):
        net = tiny_models.net()
        kept = Kept(net, tokens=6, seed=seed)
        kept.step(net, [x], number=number)
        return kept.samples

    first = sample(0)
    assert {len(captured.x_TD) for captured in first.values()} == {6}
    assert first["first"].tokens == 40
    rows = [int((x == row).all(dim=1).nonzero()) for row in first["first"].x_TD]
    assert rows == sorted(set(rows))
    # The second layer's input is a function of the same rows.
    net = tiny_models.net()
    assert_close(first["second"].x_TD, net.norm(torch.relu(net.first(x[rows]))), 1e-5)
    assert torch.equal(sample(0)["first"].x_TD, first["first"].x_TD)
    assert not torch.equal(sample(1)["first"].x_TD, first["first"].x_TD)
    assert not torch.equal(sample(0, number=1)["first"].x_TD, first["first"].x_TD)


def test_accumulated_passes_share_the_room():
    net = tiny_models.net()
    kept = Kept(net, tokens=6)
    kept.step(net, tiny_models.batches(3))
    assert len(kept.samples["first"].x_TD) == 6
    batches = tiny_models.batches(3)
    for row, batch in zip(kept.samples["first"].x_TD[::2], batches, strict=True):
        assert (batch == row).all(dim=1).any()


def test_layers_with_one_input_share_its_sample():
    pytest.importorskip("transformers")
    model = tiny_models.llama().train()
    kept = Kept(model, tokens=5)
    kept.step(model, [tiny_models.token_batch()])
    attention = "model.layers.0.self_attn"
    q, k, o = (kept.samples[f"{attention}.{name}_proj"] for name in "qko")
    assert q.x_TD.data_ptr() == k.x_TD.data_ptr()
    assert q.x_TD.data_ptr() != o.x_TD.data_ptr()


class Twice(nn.Module):
    """A layer that is called two times, one that gets no gradient, one without tokens."""

    def __init__(self):
        super().__init__()
        self.shared, self.unused, self.empty = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        self.unused(x)
        nothing = self.empty(x[:0]).sum()
        return self.shared(input=torch.tanh(self.shared(x))) + nothing


def test_calls_of_one_layer_add_up_and_unused_layers_are_left_out():
    model = Twice()
    kept = Kept(model, dict(model.named_children()))
    kept.step(model, tiny_models.batches(1))
    assert kept.samples.keys() == {"shared"}
    captured = kept.samples["shared"]
    assert_close(captured.dY_TO.T @ captured.x_TD, model.shared.weight.grad, 1e-5)
    assert captured.tokens == 10


def test_an_output_that_is_changed_in_place_keeps_its_own_gradient():
    layer = nn.Linear(16, 6)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    kept = Kept(model, {"0": layer})
    kept.step(model, tiny_models.batches(1))
    captured = kept.samples["0"]
    assert_close(captured.dY_TO.T @ captured.x_TD, layer.weight.grad, 1e-5)


def test_fewer_passes_than_announced_are_handed_over_at_the_end():
    net = tiny_models.net()
    kept = Kept(net)
    with kept.capture as capture:
        capture.begin(0, 4, True)
        tiny_models.loss_of(net, tiny_models.batches(1)[0]).backward()
        assert not kept.samples
        capture.finish()
    assert kept.samples.keys() == {"first", "second"}


def test_nothing_is_taken_outside_of_a_step_or_without_gradients():
    net = tiny_models.net()
    x = tiny_models.batches(1)[0]
    kept = Kept(net)
    with kept.capture as capture:
        tiny_models.loss_of(net, x).backward()
        capture.begin(0, 1, True)
        with torch.no_grad():
            net(x)
        capture.finish()
    tiny_models.loss_of(net, x).backward()
    assert kept.order == []


def test_a_step_without_samples_has_means():
    net = tiny_models.net()
    kept = Kept(net)
    kept.step(net, tiny_models.batches(1), sample=False)
    assert kept.order == [("mean", "first"), ("mean", "second")]


def test_hooks_are_gone_afterwards_and_gradients_are_untouched():
    net, other = tiny_models.net(), tiny_models.net()
    batch = tiny_models.batches(1)[0]
    Kept(net).step(net, [batch])
    tiny_models.loss_of(other, batch).backward()
    assert torch.equal(net.first.weight.grad, other.first.weight.grad)
    assert not net._forward_pre_hooks
    assert not net.first._forward_hooks
