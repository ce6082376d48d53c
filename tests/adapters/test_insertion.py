"""SSF and Hydra in any model: where they go, what trains, and that autograd agrees."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import velora_torch
from velora_torch.adapters import Hydra, ScaleShift, add_hydra, add_ssf
from velora_torch.adapters.attach import adapted_modules

from ..closeness import assert_bitwise, assert_close
from ..tiny_models import Net, llama, loss_of, net, token_batch, train
from .models import (
    CASES,
    Case,
    build,
    classifier_bert,
    disturb,
    image_dict,
    output,
    timm_vit,
    trains,
)

METHODS = [pytest.param(add_ssf, id="ssf"), pytest.param(add_hydra, id="hydra")]


@pytest.mark.parametrize("case", CASES)
def test_ssf_is_behind_every_operator(case: Case):
    model = build(case)
    operators = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        or type(module).__name__ == "Conv1D"
        or "Norm" in type(module).__name__
    } - set(case[2])
    with_bias = {n for n in operators if getattr(model.get_submodule(n), "bias", None) is not None}
    keys, y = set(model.state_dict()), output(model, case[1]())
    assert add_ssf(model) is model
    assert set(adapted_modules(model)) == operators
    assert keys <= set(model.state_dict()), "the base's names stay"
    scales = {f"{name}.ssf.weight" for name in operators}
    shifts = {f"{name}.ssf.bias" for name in with_bias}
    head = {f"{h}.{p}" for h in case[3] for p, _ in model.get_submodule(h).named_parameters()}
    assert set(model.state_dict()) == keys | scales | shifts
    assert trains(model) == scales | shifts | head
    moved = output(model, case[1]())
    assert not torch.equal(moved, y)
    for adapter in model.modules():
        if isinstance(adapter, ScaleShift):
            nn.init.ones_(adapter.weight)
            if adapter.bias is not None:
                nn.init.zeros_(adapter.bias)
    assert_close(output(model, case[1]()), y, 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_hydra_is_on_the_linear_layers_of_the_blocks_and_starts_exact(case: Case):
    model = build(case)
    y = output(model, case[1]())
    keys = set(model.state_dict())
    add_hydra(model, rank=3)
    assert_close(output(model, case[1]()), y, 1e-14)
    adapted = adapted_modules(model)
    assert adapted
    for name, module in model.named_modules():
        linear = isinstance(module, (nn.Linear, Conv1D))
        in_a_block = any(part.isdigit() for part in name.split("."))
        inside = "hydra" in name.split(".")
        assert (name in adapted) == (linear and in_a_block and not inside), name
    assert keys <= set(model.state_dict())
    assert all(".hydra." in name or name.startswith(tuple(case[3])) for name in trains(model))


@pytest.mark.parametrize("add", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_a_few_steps_lower_the_loss(case: Case, add: Any):
    model, batch = add(build(case)), case[1]()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = loss_of(model, batch).item()
    train(model, [batch] * 4, torch.optim.AdamW, lr=0.003)
    assert loss_of(model, batch).item() < before
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name


def test_gradients_of_ssf_are_those_of_the_formula():
    model = net(dtype=torch.float64)
    add_ssf(model, head=["second"])
    x = torch.randn(5, 16, dtype=torch.float64)
    (model(x) - 1).square().mean().backward()
    twin = net(dtype=torch.float64)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if ".ssf." not in k})
    own = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    h = twin.first(x) * own["first.ssf.weight"] + own["first.ssf.bias"]
    h = twin.norm(torch.relu(h)) * own["norm.ssf.weight"] + own["norm.ssf.bias"]
    (twin.second(h) - 1).square().mean().backward()
    for name, p in model.named_parameters():
        if ".ssf." in name:
            assert_close(p.grad, own[name].grad, 1e-12)
    assert_close(model.second.weight.grad, twin.second.weight.grad, 1e-12)


def test_gradients_of_hydra_are_those_of_the_formula():
    model = net(dtype=torch.float64)
    add_hydra(model, rank=3, alpha=6, targets=["first"], head=["second"])
    disturb(model)
    x = torch.randn(5, 16, dtype=torch.float64)
    (model(x) - 1).square().mean().backward()
    own = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    A_p, B_p, A_s, B_s = (
        own[f"first.hydra.{branch}.hydra_{letter}.weight"]
        for branch in ("parallel", "sequential")
        for letter in "AB"
    )
    y0 = x @ own["first.weight"].T + own["first.bias"]
    y = y0 + 2.0 * (x @ A_p.T @ B_p.T + y0 @ A_s.T @ B_s.T)
    h = nn.functional.layer_norm(torch.relu(y), (32,), own["norm.weight"], own["norm.bias"])
    h = h @ own["second.weight"].T + own["second.bias"]
    (h - 1).square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, own[name].grad, 1e-12)


@pytest.mark.parametrize("add", METHODS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(add: Any, how: str):
    model = add(build(CASES[0].values[0]))  # type: ignore[arg-type]
    disturb(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    batch = image_dict()
    assert_bitwise(output(twin, batch), output(model, batch))
    assert set(adapted_modules(twin)) == set(adapted_modules(model))


@pytest.mark.parametrize("add", METHODS)
def test_hooks_and_classes_stay(add: Any):
    model = net()
    seen: list[str] = []
    model.first.register_forward_hook(lambda *_: seen.append("first"))
    add(model, targets=["first"], head=["second"])
    model(torch.randn(2, 16))
    assert seen == ["first"]
    assert isinstance(model.first, nn.Linear)


@pytest.mark.parametrize("add", METHODS)
def test_adapters_of_a_16_bit_model_are_wide(add: Any):
    """A scale near one has steps of 0.008 in bfloat16."""
    model = add(build(CASES[0].values[0], torch.bfloat16))  # type: ignore[arg-type]
    adapters = [p for n, p in model.named_parameters() if ".ssf." in n or ".hydra." in n]
    assert {p.dtype for p in adapters} == {torch.float32}
    batch = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)}
    y = output(model, batch)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    narrow = add(build(CASES[0].values[0], torch.bfloat16), dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("add", METHODS)
def test_under_autocast(add: Any):
    model = add(build(CASES[0].values[0], torch.float32))  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        y = output(model, {"pixel_values": torch.randn(2, 3, 8, 8)})
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("shift", [True, False])
def test_shifts_can_be_had_everywhere_or_nowhere(shift: bool):
    model = add_ssf(llama(), shift=shift)
    scales = [m for m in model.modules() if isinstance(m, ScaleShift)]
    assert {m.bias is not None for m in scales} == {shift}


def test_targets():
    model = add_ssf(timm_vit(), targets=["norm1", "mlp.fc2"])
    assert {name.split(".", 2)[-1] for name in adapted_modules(model)} == {"norm1", "mlp.fc2"}
    model = add_ssf(timm_vit(), targets=r"blocks\.0\..*")
    assert all(name.startswith("blocks.0.") for name in adapted_modules(model))
    model = add_hydra(timm_vit(), targets=lambda name, module: name.endswith("attn.proj"))
    assert {name.rpartition(".")[2] for name in adapted_modules(model)} == {"proj"}
    model = add_hydra(classifier_bert(), targets=["pooler.dense"])
    assert list(adapted_modules(model)) == ["bert.pooler.dense"], "outside of the blocks, if named"


def test_convolutions_have_their_features_first():
    model = add_ssf(timm_vit())
    assert model.patch_embed.proj.ssf.dim == -3
    y = model.patch_embed.proj(torch.randn(2, 3, 8, 8))
    assert y.shape == (2, 32, 2, 2)
    batch_norm = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.Flatten())
    add_ssf(batch_norm, head=[])
    assert batch_norm(torch.randn(2, 3, 5)).shape == (2, 30)


@pytest.mark.parametrize("add", METHODS)
def test_restore_and_recompute_leave_adapters_in_place(add: Any):
    model = add(llama())
    disturb(model)
    batch = token_batch()
    y, names = output(model, batch), set(adapted_modules(model))
    velora_torch.recompute(model, loss=False)
    assert_close(output(model, batch), y, 1e-6)
    velora_torch.restore(model)
    assert set(adapted_modules(model)) == names
    assert_bitwise(output(model, batch), y)


# ------------------------------------------------------------------ bad input


def frozen_nothing_changed(model: nn.Module) -> bool:
    return not adapted_modules(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("add", METHODS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"targets": ["fist"], "head": []}, "nearest: first", id="near-miss"),
        pytest.param({"targets": "zz.*", "head": []}, "matches no module", id="expression"),
        pytest.param({"targets": ["second"], "head": ["second"]}, "part of the head", id="head"),
        pytest.param({"targets": lambda *_: False, "head": []}, "nothing to adapt", id="nothing"),
        pytest.param({}, r"pass head=\[\.\.\.\] .* first, norm, second", id="no-head"),
        pytest.param({"head": ["thrid"]}, "no module 'thrid'", id="unknown-head"),
        pytest.param({"head": "second"}, "must be a list", id="head-is-a-string"),
    ],
)
def test_refusals(add: Any, settings: dict[str, Any], message: str):
    model = Net()
    with pytest.raises(ValueError, match=message):
        add(model, **settings)
    assert frozen_nothing_changed(model)


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_adapters_that_are_there_already(first: Any, second: Any):
    model = first(net(), head=["second"])
    with pytest.raises(ValueError, match=r"(SSF|Hydra) adapters already .*merge_adapters"):
        second(model, head=["second"])


@pytest.mark.parametrize("add", METHODS)
def test_a_compressed_model_is_refused(add: Any):
    model = velora_torch.compress(net(), velora_torch.VeloraConfig(num_groups=4))
    with pytest.raises(ValueError, match=r"before velora_torch\.compress"):
        add(model, head=[])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("add", METHODS)
def test_a_peft_model_is_refused(add: Any):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PEFT adapters already"):
        add(model)


@pytest.mark.parametrize("add", METHODS)
def test_layers_that_are_used_without_being_called(add: Any):
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ValueError, match="uses its weight without calling it"):
        add(model, head=[])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank must be"), ({"rank": 2.5}, "rank must be"), ({"alpha": 0}, "alpha must")],
)
def test_sizes_of_hydra(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        add_hydra(net(), head=[], **settings)


def test_a_layer_with_branches_prints_its_scale():
    assert "scaling=2" in repr(Hydra(4, 6, rank=2, alpha=4))
