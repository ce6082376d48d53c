"""Ways to train: what they do to a model, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.simulator.four_bit import Linear4bit
from velora_torch.memory.simulator.setup import Setup, dtype_named
from velora_torch.recomputation import recomputed

from ... import tiny_models

pytest.importorskip("transformers")
# PEFT asks transformers under a name that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")

VELORA = VeloraConfig(sub_token_size=4)


def applied(setup: Setup, fake: bool = False, model: Any = None) -> nn.Module:
    model = (tiny_models.llama(layers=4) if model is None else model).train()
    world = FakeWorld() if fake else None
    return setup.apply(world.model(model) if world else model, world)[0]


def kinds(model: nn.Module) -> dict[str, Any]:
    return {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}


# ------------------------------------------------------------------ what is applied

APPLIED = {
    "full": Setup(),
    "velora": Setup(velora=VELORA),
    "lora": Setup(method="lora", lora_rank=3, lora_targets=("q_proj", "v_proj")),
    "lora-own-type": Setup(method="lora", adapters_in_float32=False),
    "lora-velora": Setup(method="lora", velora=VeloraConfig(targets=["lora_A"], num_groups=4)),
    "gc-recompute": Setup(checkpoint_every=2, recompute=True, chunked_loss=True),
}


@pytest.mark.parametrize("setup", APPLIED.values(), ids=APPLIED)
def test_fake_and_real_models_become_the_same(setup: Setup):
    if setup.method == "lora":
        pytest.importorskip("peft")
    real, fake = (applied(setup, kind, tiny_models.llama().bfloat16()) for kind in (False, True))
    assert kinds(real) == kinds(fake)
    assert [type(m) for m in real.modules()] == [type(m) for m in fake.modules()]
    assert [m.training for m in real.modules()] == [m.training for m in fake.modules()]


def test_adapters_alone_are_trained():
    pytest.importorskip("peft")
    model = applied(Setup(method="lora", lora_rank=5))
    trained = {n: s for n, (s, _, grad) in kinds(model).items() if grad}
    assert trained
    assert all("lora_" in name and 5 in shape for name, shape in trained.items())
    assert not any("lm_head" in name for name in trained)


@pytest.mark.parametrize("float32", [True, False], ids=["float32", "own-type"])
@pytest.mark.parametrize("fake", [True, False], ids=["fake", "real"])
def test_type_of_adapters(float32: bool, fake: bool):
    pytest.importorskip("peft")
    setup = Setup(method="lora", adapters_in_float32=float32)
    model = applied(setup, fake, tiny_models.llama().bfloat16())
    types = {p.dtype for p in model.parameters() if p.requires_grad}
    assert types == {torch.float32 if float32 else torch.bfloat16}


def test_qlora_quantises_the_blocks():
    pytest.importorskip("peft")
    model = applied(Setup(method="qlora"), fake=True)
    quantised = [n for n, m in model.named_modules() if isinstance(m, Linear4bit)]
    assert len(quantised) == 4 * 7
    assert not any("lm_head" in name for name in quantised)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(("every", "chosen"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_every_nth_block_is_checkpointed(every: int, chosen: list[int]):
    model: Any = applied(Setup(checkpoint_every=every))
    blocks = model.model.layers
    assert [i for i, block in enumerate(blocks) if block.gradient_checkpointing] == chosen


def test_adapters_train_behind_checkpointing():
    """Frozen embeddings give no gradient, and checkpointing would see nothing to train."""
    pytest.importorskip("peft")
    model = applied(Setup(method="lora", checkpoint_every=1))
    batch = tiny_models.token_batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


def test_velora_and_recomputation_meet():
    model = applied(Setup(velora=VELORA, recompute=True, chunked_loss=False))
    assert len(velora_torch.summary(model).compressed) == 4 * 7
    names = " ".join(recomputed(model))
    assert "norm" in names
    assert "act_fn" in names
    assert "lm_head" not in names


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw_fused", "adamw_8bit"])
def test_optimizers_are_those_of_the_device(name: str, device: str):
    world = FakeWorld()
    model, optimizer = Setup(optimizer=name).apply(world.model(tiny_models.llama()), world, device)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    if name in ("adamw", "sgd"):
        assert all(g["foreach"] == (device == "cuda") for g in optimizer.param_groups)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "loar"}, r"unknown method 'loar' \(did you mean 'lora'"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'"),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"lora_rank": -1}, "lora_rank must be at least 1, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, got 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Setup(**fields)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_nothing_to_train(method: Any):
    model = nn.Sequential(nn.ReLU())
    if method == "full":
        model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter that requires a gradient|target"):
        Setup(method=method).apply(model)


def test_types_by_name():
    assert dtype_named("bfloat16") is dtype_named(torch.bfloat16) is torch.bfloat16
    for wrong in ("bf16", "int8", "Tensor", ""):
        with pytest.raises(ValueError, match=r"unknown dtype .* choose one of bfloat16"):
            dtype_named(wrong)


# ------------------------------------------------------------------ texts and keys


def test_text_and_json():
    setup = Setup(
        method="lora",
        velora=VeloraConfig(targets=["v_proj", "down_proj"], num_groups=8),
        checkpoint_every=2,
        recompute=True,
        chunked_loss=True,
        optimizer="sgd",
        accumulation=4,
        lora_targets=("q_proj",),
    )
    text = (
        "lora, checkpointing of 1 in 2, VeLoRA on v_proj+down_proj (G=8), "
        "recomputed norms and activations, chunked loss, sgd, 4 micro-batches"
    )
    assert str(setup) == text
    values = json.loads(json.dumps(setup.to_dict()))
    assert values["velora"]["num_groups"] == 8
    assert values["lora_targets"] == ["q_proj"]
    assert str(Setup(velora=VELORA)) == "full, VeLoRA on all-linear (M=4), adamw"
    assert str(Setup(checkpoint_every=1)) == "full, checkpointing, adamw"


def test_setups_are_keys():
    again = VeloraConfig(sub_token_size=4)
    assert hash(Setup(velora=VELORA)) == hash(Setup(velora=again))
    assert {Setup(velora=VELORA): 1}[Setup(velora=again)] == 1


def test_plain_keeps_what_is_trained():
    setup = Setup(method="lora", lora_rank=8, checkpoint_every=1, velora=VELORA, optimizer="sgd")
    assert setup.plain() == Setup(method="lora", lora_rank=8)


@pytest.mark.parametrize(
    ("targets", "uniform"),
    [
        ("all-linear", True),
        (["v_proj"], True),
        (r"layers\.[0-3]\.", False),
        (lambda name, module: True, False),
    ],
    ids=["all", "by-suffix", "by-number", "function"],
)
def test_only_setups_that_treat_blocks_alike_extrapolate(targets: Any, uniform: bool):
    assert Setup(velora=VeloraConfig(targets=targets, num_groups=4)).extrapolates == uniform
    if isinstance(targets, list):
        assert Setup(method="lora", lora_targets=tuple(targets)).extrapolates == uniform
