"""Forgetting to call anything loses nothing; folding late, early or twice changes nothing."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys

import pytest
import torch
from torch.optim import SGD, AdamW

import velora_torch as velora
from velora_torch.subtoken import reference

from .dense import LR, batches, difference, loss_of, pair, step, train_both, trainable

ADAMW = functools.partial(AdamW, lr=3e-3, eps=1e-30, weight_decay=0.1)


def expected_weight(layer, coef):
    """The weight that the coefficients stand for, by the reference."""
    e = layer.velora_vectors
    return layer.raw_weight.detach() + reference.expand(coef, e, layer.raw_weight.shape[1])


@pytest.fixture(params=[1, 4, None], ids=lambda value: f"fold-every-{value}")
def changed(request):
    """A model with vectors, whose coefficients were changed by hand, and the weight due."""
    model, _ = pair(fold_every=request.param)
    loss_of(model, batches(1)[0]).backward()
    coef = torch.randn_like(model.up.coef)
    due = expected_weight(model.up, coef)
    with torch.no_grad():
        model.up.coef.copy_(coef)
    return model, due


def test_coefficients_changed_by_hand_reach_the_output(changed):
    model, due = changed
    x = batches(1)[0][0]
    y = torch.nn.functional.linear(x, due, model.up.bias)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model.up(x), y, rtol=1e-12, atol=1e-12)


def test_coefficients_changed_by_hand_reach_the_state_dict(changed):
    model, due = changed
    torch.testing.assert_close(model.state_dict()["up.weight"], due, rtol=1e-12, atol=1e-12)


def test_coefficients_changed_by_hand_survive_restore(changed):
    model, due = changed
    velora.restore(model)
    torch.testing.assert_close(model.up.weight.detach(), due, rtol=1e-12, atol=1e-12)


def test_coefficients_changed_by_hand_survive_fold_which_is_idempotent(changed):
    model, due = changed
    velora.fold(model)
    once = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model.up.raw_weight.detach(), due, rtol=1e-12, atol=1e-12)
    velora.fold(velora.fold(model))
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())
    assert not model.up.coef.any()


def test_coefficients_changed_by_hand_survive_copying_and_pickling(changed):
    model, due = changed
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.state_dict()["up.weight"], due, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.state_dict()["up.weight"], due, rtol=1e-12, atol=1e-12)


def test_coefficients_changed_by_hand_are_there_before_an_optimizer_steps(changed):
    model, due = changed
    velora_step = SGD(trainable(model), lr=1.0)
    gradient = model.up.coef.grad.clone()
    velora_step.step()
    v, features = model.up.velora_vectors, model.up.raw_weight.shape[1]
    due = due - reference.expand(gradient, v, features)
    torch.testing.assert_close(model.state_dict()["up.weight"], due, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fold_every", [1, 4, None])
def test_an_update_loop_without_an_optimizer_trains_as_sgd_does(fold_every):
    def by_hand(model, optimizer, batch):
        for p in model.parameters():
            p.grad = None
        loss_of(model, batch).backward()
        with torch.no_grad():
            for p in trainable(model):
                p.sub_(p.grad, alpha=LR)

    models = pair(fold_every=fold_every)
    assert train_both(models, functools.partial(SGD, lr=LR), 20, by_hand) < 1e-12


@pytest.mark.parametrize(
    "make",
    [
        ADAMW,
        functools.partial(SGD, lr=LR, momentum=0.9),
        functools.partial(SGD, lr=LR, weight_decay=0.1),
    ],
    ids=["adamw", "sgd-momentum", "sgd-decay"],
)
def test_outputs_are_the_same_whenever_folds_happen(make):
    seen = batches(22)
    outputs, weights = {}, {}
    for fold_every in (1, 4, None):
        model, _ = pair(fold_every=fold_every, init="random")
        optimizer = make(trainable(model))
        outputs[fold_every] = []
        for number, batch in enumerate(seen):
            step(model, optimizer, batch)
            if number == 9 and fold_every == 4:
                velora.fold(model)  # in between, by hand
            outputs[fold_every].append(model(batch[0]).detach())
        weights[fold_every] = copy.deepcopy(model.state_dict())
        assert bool(model.up.coef.any()) == (fold_every is None)  # state_dict has folded the rest
    for fold_every in (4, None):
        torch.testing.assert_close(outputs[fold_every], outputs[1], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(weights[fold_every], weights[1], rtol=1e-10, atol=1e-11)


def test_a_folded_model_keeps_training_exactly():
    models = pair(fold_every=None)
    start = copy.deepcopy(models[1].state_dict())
    optimizers = [ADAMW(trainable(model)) for model in models]
    for number, batch in enumerate(batches(20)):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, batch)
        if number % 5 == 2:
            velora.fold(models[0])
    assert difference(models, start) < 1e-8


def test_a_pickled_model_is_watched_where_nothing_calls_compress(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4, dtype=torch.float64)
    velora.compress(model, velora.VeloraConfig(num_groups=2, init="random"))
    torch.save(model, tmp_path / "model.pt")
    program = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
before = model.weight.detach().clone()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
optimizer.param_groups[0]["weight_decay"] = 0.1
model(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
optimizer.step()
moved = model.raw_weight.detach() - before * 0.95
torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.5), rtol=1e-6, atol=0)
try:
    torch.optim.Adafactor(model.parameters()).step()
except ValueError:
    print("watched")
"""
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "model.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "watched\n", run.stderr


@pytest.mark.parametrize(
    ("folding", "kept"),
    [
        ({}, (0.95, 1.05)),
        ({"rounding": "stochastic", "fold_every": 16}, (0.95, 1.05)),
        ({"rounding": "nearest", "fold_every": None}, (0.95, 1.05)),
        ({"rounding": "nearest"}, (0.0, 0.5)),
    ],
    ids=["default", "stochastic-late", "never", "nearest"],
)
def test_small_updates_of_bfloat16_weights(folding, kept):
    """300 steps of 1e-5: the default keeps them, rounding to nearest does not (docs/results)."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = torch.nn.Linear(96, 64, bias=False).bfloat16().to(dtype)
        start = model.weight.detach().clone()
        velora.compress(model, velora.VeloraConfig(num_groups=12, init="random", **folding))
        optimizer = AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        goal = torch.randn(96, 64, generator=generator)
        for _ in range(300):
            x = torch.randn(32, 96, generator=generator)
            (model(x.to(dtype)).float() - x @ goal).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        velora.restore(model)
        ends.append((model.weight.detach().float() - start.float()).flatten())
    exact, rounded = ends
    assert kept[0] < float(rounded @ exact / (exact @ exact)) < kept[1]
