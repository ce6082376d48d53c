"""compress, fold and restore over whole models: nothing is lost and nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig, compress, fold, restore
from velora_torch.layers import CompressedLayer
from velora_torch.model import compressed_layers

from .anatomy import anatomy, assert_same, weights
from .tiny_models import Net, batches, net, run, token_batch, train

CONFIG = VeloraConfig(num_groups=4)
SETTINGS = [
    VeloraConfig(num_groups=4),
    VeloraConfig(num_groups=4, init="random", vectors="per_group", refresh_every=2),
    VeloraConfig(num_groups=3, init="running_average"),
    VeloraConfig(num_groups=4, fold_every=None),
    VeloraConfig(num_groups=4, fold_every=3),
    VeloraConfig(num_groups=4, gradient="dense"),
]


def id_of(config: VeloraConfig) -> str:
    return f"{config.init}-{config.gradient}-fold{config.fold_every}"


# ------------------------------------------------------------------ compress and restore


@pytest.mark.parametrize("config", SETTINGS, ids=id_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restore_without_training_leaves_nothing(config: VeloraConfig, dtype: torch.dtype) -> None:
    model, x = net(dtype=dtype), batches(1, dtype=dtype)[0]
    model.first.register_forward_hook(lambda *_: None)
    model.second.note = "kept"
    before, values, y = anatomy(model), weights(model), model(x)
    identities = [id(p) for p in model.parameters()]
    compress(model, config)
    assert len(compressed_layers(model)) == 2
    assert torch.equal(model(x), y)
    assert restore(model) is model
    assert anatomy(model) == before
    assert_same(values, weights(model))
    assert [id(p) for p in model.parameters()] == identities
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("config", SETTINGS, ids=id_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restore_after_training_keeps_the_outputs(config: VeloraConfig, dtype: torch.dtype) -> None:
    model, x = net(dtype=dtype), batches(1, dtype=dtype)[0]
    before, start = anatomy(model), weights(model)
    compress(model, config)
    train(model, batches(4, dtype=dtype), lr=0.1)
    if config.fold_every != 1:
        fold(model)  # what is pending goes into the weights: equal, up to rounding
    y, values = model.eval()(x), weights(model)
    restore(model.train())
    assert anatomy(model) == before
    assert_same(values, weights(model))
    assert torch.equal(model.eval()(x), y)
    assert not torch.equal(start["first.weight"], values["first.weight"])


def test_restore_merges_what_was_never_folded() -> None:
    model, x = net(dtype=torch.float64), batches(1, dtype=torch.float64)[0]
    compress(model, VeloraConfig(num_groups=4, fold_every=None))
    start = model.first.raw_weight.detach().clone()  # type: ignore[operator,union-attr]
    train(model, batches(4, dtype=torch.float64), lr=0.1)
    assert torch.equal(model.first.raw_weight, start)  # type: ignore[arg-type]
    y = model(x)
    restore(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    assert not torch.equal(model.first.weight, start)


def test_fold_merges_pending_coefficients_once() -> None:
    model, x = net(dtype=torch.float64), batches(1, dtype=torch.float64)[0]
    compress(model, VeloraConfig(num_groups=4, fold_every=None))
    train(model, batches(3, dtype=torch.float64), lr=0.1)
    y = model(x)
    assert fold(model) is model
    assert all(not layer.velora.pending for layer in compressed_layers(model).values())
    values = weights(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    assert_same(values, weights(fold(model)))


def test_fold_and_restore_of_a_plain_model_do_nothing() -> None:
    model = net()
    before, values = anatomy(model), weights(model)
    assert restore(fold(model)) is model
    assert anatomy(model) == before
    assert_same(values, weights(model))


def test_compressing_again_after_restore_works() -> None:
    model = compress(net(), CONFIG)
    train(model, batches(2))
    restore(model)
    compress(model, VeloraConfig(num_groups=2))
    assert {layer.velora.groups for layer in compressed_layers(model).values()} == {2}
    train(model, batches(2))


def test_gradients_of_before_are_cleared_and_flags_come_back() -> None:
    model = net()
    model(batches(1)[0]).sum().backward()
    compress(model, CONFIG)
    assert model.first.raw_weight.grad is None  # type: ignore[union-attr]
    model.first.requires_grad_(False)
    restore(model)
    assert not model.first.weight.requires_grad
    assert model.second.weight.requires_grad


def test_a_model_that_is_one_linear_layer() -> None:
    model = nn.Linear(8, 4)
    compress(model, CONFIG)
    assert isinstance(model, CompressedLayer)
    train(model, batches(2, width=8))
    restore(model)
    assert type(model) is nn.Linear


class Named(nn.Linear):
    """A subclass that keeps the forward."""


def test_subclasses_get_their_class_back() -> None:
    model = nn.Sequential(Named(8, 8), nn.Linear(8, 8), Named(8, 8))
    compress(model, CONFIG)
    assert isinstance(model[0], Named)
    assert type(model[0]) is type(model[2])
    assert type(model[0]) is not type(model[1])
    restore(model)
    assert [type(m) for m in model] == [Named, nn.Linear, Named]


# ------------------------------------------------------------------ what stays what it was


def test_keys_names_and_hooks_stay() -> None:
    model = net()
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    called: list[str] = []
    model.first.register_forward_hook(lambda *_: called.append("forward"))
    model.first.register_forward_pre_hook(lambda *_: called.append("before"))
    model.first.register_full_backward_hook(lambda *_: called.append("backward"))
    compress(model, CONFIG)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == names
    x = batches(1)[0].requires_grad_()
    model(x).sum().backward()
    assert called == ["before", "forward", "backward"]


def test_trainable_parameters_are_coefficients_and_the_rest() -> None:
    model = compress(net(), CONFIG)
    trainable = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        "first.bias": (32,),
        "first.coef": (32, 4),
        "norm.weight": (32,),
        "norm.bias": (32,),
        "second.bias": (6,),
        "second.coef": (6, 4),
    }


class Twice(nn.Module):
    """One linear layer under two names, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.c = nn.Linear(8, 8)
        self.d = nn.Linear(8, 8)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(torch.relu(self.a(x)))))


def test_shared_modules_are_compressed_once_and_tied_weights_never() -> None:
    torch.manual_seed(0)
    model = Twice()
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    compress(model, CONFIG)
    assert list(compressed_layers(model)) == ["a"]
    assert model.a is model.b
    assert model.c.weight is model.d.weight
    assert type(model.c) is nn.Linear
    exact = velora_torch.summary(model).exact
    assert exact["c"] == "tied: shares its weight with d"
    assert exact["d"] == "tied: shares its weight with c"
    assert list(model.state_dict()) == keys
    x = batches(1, width=8)[0]
    assert torch.equal(model(x), plain(x))
    train(model, batches(3, width=8), lr=0.1)
    assert not torch.equal(model.a.weight, plain.a.weight)
    restore(model)
    assert model.a is model.b


def test_frozen_layers_are_left_alone() -> None:
    model = net()
    model.first.requires_grad_(False)
    compress(model, CONFIG)
    assert type(model.first) is nn.Linear
    assert velora_torch.summary(model).exact["first"] == "frozen: keeps no input"
    assert not model.first.weight.requires_grad


def test_a_frozen_weight_with_a_trained_bias_is_left_alone() -> None:
    model = net()
    model.first.weight.requires_grad_(False)
    compress(model, CONFIG)
    assert velora_torch.summary(model).exact["first"] == "frozen: keeps no input"
    assert list(compressed_layers(model)) == ["second"]


def test_freezing_after_compress_stops_the_coefficients() -> None:
    model = compress(net(), CONFIG)
    model.first.requires_grad_(False)
    before = weights(model)
    train(model, batches(3), lr=0.1)
    after = weights(model)
    assert torch.equal(before["first.weight"], after["first.weight"])
    assert not torch.equal(before["second.weight"], after["second.weight"])


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_checkpoints_go_both_ways(assign: bool) -> None:
    trained = compress(net(), CONFIG)
    train(trained, batches(3), lr=0.1)
    x, saved = batches(1)[0], weights(trained)
    plain = Net()
    plain.load_state_dict(saved, strict=True, assign=assign)
    assert torch.equal(plain(x), trained(x))
    other = compress(Net(), CONFIG)
    assert not other.load_state_dict(plain.state_dict(), strict=True, assign=assign).missing_keys
    assert torch.equal(other(x), trained(x))
    assert other.first.coef.requires_grad  # type: ignore[union-attr]
    assert not other.first.raw_weight.requires_grad  # type: ignore[union-attr]
    train(other, batches(2), lr=0.1)
    assert not torch.equal(other(x), trained(x))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("fold_every", [3, None])
def test_loading_an_old_checkpoint_drops_pending_coefficients(
    fold_every: int | None, assign: bool
) -> None:
    model, x = net(), batches(1)[0]
    old, y = weights(model), model(x)
    compress(model, VeloraConfig(num_groups=4, fold_every=fold_every))
    train(model, batches(2), lr=0.1)
    assert model.first.velora.pending  # type: ignore[union-attr]
    model.load_state_dict(old, assign=assign)
    assert not model.first.coef.any()  # type: ignore[operator,union-attr]
    assert torch.equal(model(x), y)
    assert_same(old, weights(model))


def test_a_checkpoint_of_pending_coefficients_has_them_in_its_weights() -> None:
    model, x = net(dtype=torch.float64), batches(1, dtype=torch.float64)[0]
    compress(model, VeloraConfig(num_groups=4, fold_every=None))
    train(model, batches(3, dtype=torch.float64), lr=0.1)
    plain = net(dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert model.first.velora.pending  # type: ignore[union-attr]


# ------------------------------------------------------------------ torch's transformer layers


def encoder() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def test_torch_encoder_layer_trains_and_its_attention_stays_exact() -> None:
    model, plain = encoder(), encoder()
    x = torch.randn(2, 5, 16)
    compress(model, CONFIG)
    assert list(compressed_layers(model)) == ["linear1", "linear2"]
    exact = velora_torch.summary(model).exact
    assert exact["self_attn"] == "MultiheadAttention is not a linear layer"
    assert exact["self_attn.out_proj"].startswith("nn.MultiheadAttention uses its weight")
    assert torch.equal(model(x), plain(x))
    for mode in (model, plain):
        mode.eval()
    with torch.no_grad():  # the fast path, which reads the weights itself
        assert torch.equal(model(x), plain(x))
    train(model, [x] * 3, torch.optim.AdamW)
    for name in ("linear1.weight", "linear2.weight", "self_attn.in_proj_weight"):
        assert not torch.equal(model.state_dict()[name], plain.state_dict()[name]), name
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, run(restore(model).train(), x), rtol=1e-4, atol=1e-5)


def test_head_of_a_wrapped_language_model_is_left_alone() -> None:
    from .tiny_models import llama

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch)

    model = compress(Wrapper(), CONFIG)
    assert "inner.lm_head" not in compressed_layers(model)
    assert velora_torch.summary(model).exact["inner.lm_head"].startswith("output head")
    train(model, [token_batch()])
