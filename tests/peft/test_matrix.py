"""Each of PEFT's methods on each tiny model: compressed, trained and saved like plain PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.checkpoint import load_state, save_state
from velora_torch.memory.count import saved_bytes

from ..closeness import assert_bitwise, assert_close
from ..tiny_models import llama, loss_of, run, token_batch
from .cases import (
    EXACT,
    IGNORED,
    METHODS,
    PAIRS,
    adapted,
    batch_of,
    compressed,
    compressed_modules,
    layers_of,
)

pytestmark = [pytest.mark.filterwarnings(text) for text in IGNORED]

each = pytest.mark.parametrize(("method", "name"), PAIRS, ids=[f"{m}-{n}" for m, n in PAIRS])
MERGEABLE = [pair for pair in PAIRS if pair[1] in ("llama", "gpt2")]


def with_input(model: Any, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """A batch whose input can be differentiated."""
    batch = batch_of(name)
    if "pixel_values" in batch:
        x = batch["pixel_values"].requires_grad_()
        return batch, x
    x = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return {"inputs_embeds": x}, x


@each
def test_outputs_and_input_gradients_are_exact(method: str, name: str):
    plain = adapted(method, name)
    model = compressed(plain)
    results = []
    for each_model in (plain, model):
        batch, x = with_input(each_model, name)
        y = run(each_model, batch)
        (dX,) = torch.autograd.grad(y.square().mean(), x)
        results.append((y, dX))
    assert_close(results[1][0], results[0][0], 1e-12)
    assert_close(results[1][1], results[0][1], 1e-10)
    assert_close(run(model.eval(), batch_of(name)), run(plain.eval(), batch_of(name)), 1e-12)


@each
def test_it_learns_saves_memory_and_is_summarised(method: str, name: str):
    plain = adapted(method, name, torch.float32)
    model = compressed(plain)
    batch = batch_of(name, dtype=torch.float32)
    kept = []
    for each_model in (plain, model):
        with saved_bytes(each_model) as count:
            run(each_model, batch)
        kept.append(count())
    assert kept[1] < kept[0]

    found = velora_torch.summary(model)
    assert set(found.compressed) == set(compressed_modules(model))
    names = set(layers_of(model))
    assert {n for n in names if any(key.startswith(n) for key in found.compressed)} == names
    assert str(len(found.compressed)) in str(found)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(6):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@each
def test_saved_and_loaded_by_plain_peft(method: str, name: str, tmp_path: Path):
    plain = adapted(method, name, torch.float32)
    model = compressed(plain)
    batch = batch_of(name, dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    loss_of(model, batch).backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    expected = run(model.eval(), batch)
    again = plain.eval()  # the base of PiSSA is not the one of the checkpoint
    assert (run(again, batch) - expected).abs().max() > 0
    again.load_adapter(tmp_path, "default")
    again.set_adapter("default")
    torch.testing.assert_close(run(again.eval(), batch), expected, rtol=1e-5, atol=1e-5)
    keys = set(again.state_dict())
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize(("method", "name"), MERGEABLE, ids=[f"{m}-{n}" for m, n in MERGEABLE])
def test_merge_unmerge_and_unload(method: str, name: str):
    plain = adapted(method, name)
    model = compressed(plain).eval()
    batch, plain = batch_of(name), plain.eval()
    before = run(plain, batch)
    for each_model in (plain, model):
        each_model.merge_adapter()
    assert_close(run(model, batch), run(plain, batch), 1e-10)
    for each_model in (plain, model):
        each_model.unmerge_adapter()
    assert_close(run(model, batch), run(plain, batch), 1e-10)
    with model.disable_adapter(), plain.disable_adapter():
        assert_close(run(model, batch), run(plain, batch), 1e-10)
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    assert not compressed_modules(merged)
    assert_close(run(merged, batch), run(expected, batch), 1e-10)
    assert_close(run(merged, batch), before, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_restore_leaves_plain_peft(method: str):
    name = METHODS[method].models[0]
    plain = adapted(method, name)
    model = compressed(plain)
    expected = {n: (type(m), set(vars(m))) for n, m in plain.named_modules()}
    run(model, batch_of(name)).square().mean().backward()
    model.zero_grad()
    velora_torch.restore(model)
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == expected
    trained = [n for n, p in plain.named_parameters() if p.requires_grad]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert_bitwise(run(model.eval(), batch_of(name)), run(plain.eval(), batch_of(name)))


@pytest.mark.parametrize("method", EXACT)
def test_nothing_to_compress(method: str):
    config, reason = EXACT[method]
    model = peft.get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="leaves nothing to compress"):
        velora_torch.compress(model)
    assert not compressed_modules(model)
    assert reason in set(velora_torch.summary(model).exact.values())


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3"])
def test_a_copy_trains_by_itself(method: str):
    model = compressed(adapted(method, "llama"))
    run(model, token_batch()).square().mean().backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    run(twin, token_batch()).square().mean().backward()
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    for (name, mine), (_, other) in pairs:
        if mine.grad is not None:
            assert mine is not other, name
            assert_close(other.grad, mine.grad, 1e-10)


@pytest.mark.parametrize("init", ["average", "running_average", "random", "svd"])
def test_state_of_adapters_is_resumed(init: str, tmp_path: Path):
    """A resumed run keeps the vectors of the run that was interrupted."""
    plain = adapted("adalora", "llama")
    settings: Any = {"init": init, "vectors": "per_group"}
    model = compressed(plain, **settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for seed in range(2):
        loss_of(model, token_batch(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_state(model, tmp_path)
    again = compressed(plain, **settings)
    again.load_state_dict(model.state_dict())
    load_state(again, tmp_path)
    for each_model in (model, again):
        loss_of(each_model, token_batch(5)).backward()
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        if mine.grad is not None:
            assert_close(other.grad, mine.grad, 1e-12)
    with pytest.raises(ValueError, match=r"does not fit layer .*num_groups: 4 there, 8 here"):
        load_state(compressed(plain, **settings, num_groups=8), tmp_path)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("method", ["adalora", "loha", "ia3", "dora"])
def test_gradient_checkpointing(method: str, reentrant: bool):
    plain = adapted(method, "llama")
    gradients = []
    for checkpointing in (False, True):
        model = compressed(plain)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss_of(model, token_batch()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-9)


def test_a_backward_pass_of_gradients_is_refused():
    model = compressed(adapted("ia3", "llama"))
    loss = loss_of(model, token_batch())
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|once_differentiable"):
        sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]


def test_new_vectors_after_so_many_steps():
    model = compressed(adapted("ia3", "llama"), refresh_every=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    drawn = []
    for seed in range(4):
        loss_of(model, token_batch(seed)).backward()
        optimizer.step()
        layers = compressed_modules(model).values()
        drawn.append([s.draws for m in layers for s in m.velora_adapter.sites.values()])  # type: ignore[union-attr]
    assert drawn == [[1] * 4, [1] * 4, [2] * 4, [2] * 4]


def test_groups_wider_than_the_layer_are_refused():
    model = peft.get_peft_model(llama(), METHODS["loha"].config("llama"))
    with pytest.raises(ValueError, match="num_groups=64 is larger than the 32 input features"):
        velora_torch.compress(model, VeloraConfig(num_groups=64))


def test_all_linear_takes_lora_a_alone():
    model = compressed(adapted("lora", "llama"))
    assert {name.split(".")[-2] for name in compressed_modules(model)} == {"lora_A"}
    exact = velora_torch.summary(model).exact
    reasons = {name.split(".")[-2]: why for name, why in exact.items() if "lora_B" in name}
    assert reasons == {"lora_B": "up-projection of an adapter: its input is low-rank already"}
