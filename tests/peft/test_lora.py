"""LoRA: what an adapted layer keeps, DoRA's identity, several adapters, and merging."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.integrations.peft_watch import LateAdapterWarning
from velora_torch.layers import CompressedLayer
from velora_torch.model import compressed_layers

from ..closeness import assert_close
from ..layers.test_saved_bytes import saved, shapes
from ..tiny_models import llama, loss_of, run, token_batch
from .cases import GROUPS, IGNORED, adapted, compressed, compressed_modules, disturb

pytestmark = [pytest.mark.filterwarnings(text) for text in IGNORED]

T, D, O, R = 30, 48, 24, 3  # noqa: E741


def one_layer(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    base = nn.Sequential(nn.Linear(D, O)).to(dtype)
    model = peft.get_peft_model(base, peft.LoraConfig(r=R, target_modules=["0"], **settings))
    return disturb(model).train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_adapters_get_the_settings_that_are_recommended_for_them():
    model = velora_torch.compress(one_layer())
    (layer,) = compressed_layers(model).values()
    assert layer.velora.config == VeloraConfig.recommended("lora")
    plain = velora_torch.compress(nn.Sequential(nn.Linear(D, O)))
    (layer,) = compressed_layers(plain).values()
    assert layer.velora.config == VeloraConfig()


@pytest.mark.parametrize("first", [False, True], ids=["inner", "first-layer"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_adapted_layer_keeps_z(dropout: float, first: bool):
    """PEFT casts a bfloat16 input to float32 for its adapter: neither is kept."""
    model = compressed(one_layer(lora_dropout=dropout))
    assert model.base_model.model[0].lora_A["default"].raw_weight.dtype == torch.float32
    kept = saved(model, torch.randn(T, D).bfloat16().requires_grad_(not first))
    left = [(T, GROUPS), (T, R)]  # z, and the input of lora_B
    if dropout and not first:  # the mask, scaled: the gradient of the input needs it
        left.append((T, D))
    assert shapes(kept) == sorted(left)


def test_a_plain_adapted_layer_keeps_its_cast_input():
    """The yardstick."""
    kept = saved(one_layer(), torch.randn(T, D).bfloat16().requires_grad_())
    assert shapes(kept) == [(T, R), (T, D)]


# ------------------------------------------------------------------ DoRA


@pytest.mark.parametrize("init", ["average", "running_average", "batch_average", "svd"])
def test_dora_draws_from_tokens(init: str):
    """DoRA calls lora_A on the identity first: that is no batch."""
    torch.manual_seed(0)
    x = torch.randn(T, D, dtype=torch.float64) + torch.arange(D) / D
    vectors = {}
    for use_dora in (False, True):
        model = compressed(one_layer(torch.float64, use_dora=use_dora), init=init)
        model(x).square().mean().backward()
        (matrix,) = compressed_modules(model).values()
        assert isinstance(matrix, CompressedLayer)
        assert matrix.velora.draws == 1
        vectors[use_dora] = matrix.velora_vectors
    assert_close(vectors[True], vectors[False], 1e-12)


def test_dora_magnitude_is_exact_unless_named():
    plain = one_layer(torch.float64, use_dora=True)
    model = compressed(plain)
    named = compressed(plain, targets=["lora_A", "lora_magnitude_vector"])
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    for each_model in (plain, model, named):
        each_model(x).square().mean().backward()

    def gradient(each_model: Any) -> Tensor:
        return each_model.base_model.model[0].lora_magnitude_vector["default"].weight.grad

    assert_close(gradient(model), gradient(plain), 1e-10)
    assert (gradient(named) - gradient(plain)).norm() > 1e-6
    sizes = [sum(t.numel() for t in saved(m, x)) for m in (plain, model, named)]
    assert sizes[0] > sizes[1] > sizes[2]
    why = velora_torch.summary(model).exact["base_model.model.0.lora_magnitude_vector.default"]
    assert why == "beside the matrices of its adapter (name it in targets to compress it)"


def test_a_summary_draws_nothing():
    """It tries what DoRA's layer does, before any batch."""
    model = compressed(one_layer(torch.float64, use_dora=True))
    velora_torch.summary(model)
    (matrix,) = compressed_modules(model).values()
    assert isinstance(matrix, CompressedLayer)
    assert not matrix.velora.drawn
    assert all(module.training for module in model.modules())


# ------------------------------------------------------------------ several adapters


def two_adapters() -> Any:
    model = adapted("lora", "llama")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.to(torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.add_(0.1)
    return model


def of(model: nn.Module, adapter: str) -> dict[str, CompressedLayer]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedLayer)}
    return {n: m for n, m in layers.items() if n.endswith(f".{adapter}")}


@pytest.mark.parametrize("gradient", ["factored", "dense"])
def test_the_active_adapter_is_switched(gradient: str):
    plain = two_adapters()
    model = compressed(plain, gradient=gradient)
    assert len(of(model, "default")) == len(of(model, "other")) == 4
    weights = {n: m.raw_weight.detach().clone() for n, m in compressed_modules(model).items()}  # type: ignore[union-attr]
    assert not any(p.requires_grad for m in of(model, "other").values() for p in m.parameters())
    for active, resting in (("default", "other"), ("other", "default")):
        for each_model in (model, plain):
            each_model.set_adapter(active)
        optimizer = torch.optim.SGD(trainable(model), 0.5)
        loss_of(model, token_batch()).backward()
        before = {n: m.raw_weight.detach().clone() for n, m in of(model, resting).items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in of(model, active).items():
            assert (layer.raw_weight - weights[name]).abs().sum() > 0, name
        for name, layer in of(model, resting).items():
            assert torch.equal(layer.raw_weight, before[name]), name
    expected = {n: m.raw_weight.detach().clone() for n, m in compressed_modules(model).items()}  # type: ignore[union-attr]
    velora_torch.restore(model)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert model.get_submodule(name).weight.requires_grad == name.endswith(".other")


def test_disabled_and_enabled_adapters_train_on():
    model = compressed(adapted("lora", "llama"))
    reference = copy.deepcopy(model)
    with model.disable_adapter():
        run(model, token_batch())
    for each_model in (model, reference):
        loss_of(each_model, token_batch()).backward()
    for layer, other in zip(
        of(model, "default").values(), of(reference, "default").values(), strict=True
    ):
        assert not layer.raw_weight.requires_grad
        assert_close(layer.coef.grad, other.coef.grad, 1e-12)
        assert layer.raw_weight.grad is None


def test_an_adapter_added_later_is_warned_of():
    model = compressed(adapted("lora", "llama"))
    loss_of(model, token_batch()).backward()
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    loss_of(model, token_batch()).backward()  # not active: nothing to say
    model.set_adapter("late")
    with pytest.warns(LateAdapterWarning, match=r"q_proj.lora_A.late' and 1 more .*restore"):
        loss_of(model, token_batch()).backward()
    loss_of(model, token_batch()).backward()  # once
    velora_torch.restore(model)
    velora_torch.compress(model, VeloraConfig(num_groups=GROUPS))
    assert len(of(model, "late")) == 2
    loss_of(model, token_batch()).backward()
    assert all(layer.coef.grad is not None for layer in of(model, "late").values())


def test_modules_to_save():
    """A copy that PEFT trains whole is a layer like others; an output head stays exact."""
    settings: Any = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "o_proj"]}
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, **settings))
    velora_torch.compress(model, VeloraConfig(num_groups=GROUPS))
    kinds = {name.split(".")[-3] for name in compressed_modules(model)}
    assert kinds == {"q_proj", "o_proj"}
    why = velora_torch.summary(model).exact["base_model.model.lm_head.modules_to_save.default"]
    assert why.endswith("head of the model (name it in targets to compress it)")
    loss_of(model.train(), token_batch()).backward()
    assert all(p.grad is not None for p in trainable(model) if "lora_A" not in str(p))


# ------------------------------------------------------------------ merging, and PEFT's own


@pytest.mark.parametrize("safe", [False, True], ids=["in-place", "safe"])
def test_merging_takes_pending_coefficients(safe: bool):
    model = compressed(adapted("lora", "llama"), fold_every=None)
    loss_of(model, token_batch()).backward()
    torch.optim.AdamW(trainable(model), 0.01).step()
    assert all(layer.velora.pending for layer in of(model, "default").values())
    trained = run(model.eval(), token_batch())
    untrained = run(adapted("lora", "llama").eval(), token_batch())
    assert (trained - untrained).abs().max() > 1e-3
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    assert_close(run(merged, token_batch()), trained, 1e-10)
    plain = velora_torch.restore(model)
    assert_close(run(plain, token_batch()), trained, 1e-10)
    bare = llama().double()
    assert_close(run(plain.unload(), token_batch()), run(bare, token_batch()), 1e-12)


def test_pefts_own_velora_is_left_alone():
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], velora_config=peft.VeloraConfig(num_groups=4)
    )
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="PEFT's own VeLoRA compresses its input"):
        velora_torch.compress(model, VeloraConfig(num_groups=GROUPS))
    assert not compressed_modules(model)
