"""Losses and gradients are what they were, whatever recompute is combined with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.recomputation import loss as loss_module
from velora_torch.recomputation import recompute, recomputed, undo_recompute

from .cases import CASES, assert_same, build, gradients, kept_by

pytestmark = pytest.mark.filterwarnings("ignore:VeLoRA. compressing these layers frees no")

KINDS = {
    "llama": {"norm": 5, "activation": 2, "chunked loss": 1},
    "llama-tied": {"norm": 5, "activation": 2, "chunked loss": 1},
    "qwen2": {"norm": 5, "activation": 2, "chunked loss": 1},
    "gemma2": {"norm": 9, "activation": 2, "chunked loss": 1},
    "gpt2": {"activation": 2, "chunked loss": 1},
    "bert": {"activation": 3, "chunked loss": 1},
    "vit": {"activation": 2},
    "t5-relu": {"norm": 12, "chunked loss": 1},
    "t5-gated": {"norm": 12, "activation": 4, "chunked loss": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_models(name: str, monkeypatch: pytest.MonkeyPatch):
    model, batch = build(name)
    plain_kept = kept_by(model, batch)
    expected = gradients(model, batch)
    assert recompute(model) is model
    found: dict[str, int] = {}
    for kind in recomputed(model).values():
        found[kind] = found.get(kind, 0) + 1
    assert found == KINDS[name]
    # Several chunks; transformers computes losses in float32, whatever the model's type.
    monkeypatch.setattr(loss_module, "MIN_ROWS", 3)
    assert_same(gradients(model, batch), expected, tolerance=1e-5)
    assert _nbytes(kept_by(model, batch)) < _nbytes(plain_kept)
    undo_recompute(model)
    recompute(model, loss=False)
    assert_same(gradients(model, batch), expected)


def _nbytes(counted: Any) -> int:
    return sum(
        numbers * count * getattr(torch, dtype).itemsize
        for (dtype, numbers), count in counted.items()
    )


@pytest.mark.parametrize("name", CASES)
def test_bf16(name: str):
    model, batch = build(name, torch.bfloat16)
    expected = gradients(model, batch)
    recompute(model, loss=False)
    assert_same(gradients(model, batch), expected, tolerance=2e-2)
    # Close, since gradients that meet in one tensor are added in another order.
    recompute(model)  # logits in bf16, loss in float32, sums of chunks in another order
    assert_same(gradients(model, batch), expected, tolerance=2e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-gated", "bert"])
def test_autocast(name: str):
    model, batch = build(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, batch)
        recompute(model, loss=False)
        assert_same(gradients(model, batch), expected, tolerance=1e-6)
        recompute(model)
    # The backward pass is outside of autocast, as it should be.
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same((loss.detach(), found), expected, tolerance=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing(name: str):
    model, batch = build(name)
    model.config.use_cache = False
    expected = gradients(model, batch)
    model.activation_checkpointing_enable()
    recompute(model, loss=False)
    assert_same(gradients(model, batch), expected)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "gc"])
@pytest.mark.parametrize("first", ["recompute", "compress"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-gated", "vit"])
def test_compressed(name: str, first: str, checkpointed: bool):
    model, batch = build(name)
    config = VeloraConfig(num_groups=4, init="random")
    twin = velora_torch.compress(copy.deepcopy(model), config)
    expected = gradients(twin, batch)
    if checkpointed:
        model.config.use_cache = False
        model.activation_checkpointing_enable()
    if first == "recompute":
        velora_torch.compress(recompute(model, loss=False), config)
    else:
        recompute(velora_torch.compress(model, config), loss=False)
    assert_same(gradients(model, batch), expected)
    classes = [type(module) for module in build(name)[0].modules()]
    velora_torch.restore(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("order", ["recompute-first", "peft-first"])
def test_lora(order: str, compressed: bool):
    peft = pytest.importorskip("peft")
    model, batch = build("llama")
    model.config.use_cache = False
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)

    def wrap(model: Any) -> Any:
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, lora).double()
        if compressed:
            config = VeloraConfig(targets=["lora_A"], num_groups=4, init="random")
            velora_torch.compress(wrapped, config)
        return wrapped

    expected = gradients(wrap(copy.deepcopy(model)), batch)
    ours = (
        wrap(recompute(model, loss=False))
        if order == "recompute-first"
        else recompute(wrap(model), loss=False)
    )
    assert sum(kind == "norm" for kind in recomputed(ours).values()) == 5
    assert_same(gradients(ours, batch), expected)


def test_frozen_norms_need_no_gradient():
    model, batch = build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    expected = gradients(model, batch)
    recompute(model, loss=False)
    assert_same(gradients(model, batch), expected)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_bitwise_the_same(name: str):
    model, batch = build(name, torch.float32)
    model.eval()
    with torch.no_grad():
        expected = model(**batch)
        recompute(model)
        found = model(**batch)
    assert type(found.logits) is torch.Tensor
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_generate():
    model, batch = build("llama", torch.float32)
    model.eval()
    ids = batch["input_ids"]
    wanted = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **wanted)
    assert torch.equal(recompute(model).generate(ids, **wanted), expected)


def test_training_with_dropout():
    model, batch = build("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    torch.manual_seed(3)
    expected = gradients(model, batch)
    recompute(model)
    torch.manual_seed(3)
    assert_same(gradients(model, batch), expected)


def test_twice_and_undo():
    model, batch = build("llama")
    classes = [type(module) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    keys = list(model.state_dict())
    expected = gradients(model, batch)
    recompute(model)
    once = [type(module) for module in model.modules()]
    assert [type(module) for module in recompute(model).modules()] == once
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert list(model.state_dict()) == keys
    assert undo_recompute(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert recomputed(model) == {}
    assert_same(gradients(model, batch), expected)


def test_parts_can_be_chosen():
    model, _ = build("llama")
    for parts, kinds in [
        ({"activations": False, "loss": False}, {"norm"}),
        ({"norms": False, "loss": False}, {"activation"}),
        ({"norms": False, "activations": False}, {"chunked loss"}),
    ]:
        assert set(recomputed(recompute(model, **parts)).values()) == kinds
        undo_recompute(model)


def test_random_state_is_left_alone():
    model, _ = build("bert")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    recompute(model)
    assert torch.equal(torch.rand(3), expected)
