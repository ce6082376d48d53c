"""What people put around a step: accumulation, clipping, scaling, schedules, closures."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import velora_torch as velora

from .dense import LAYERS, batches, difference, loss_of, pair, step, train_both, trainable

ADAMW = functools.partial(AdamW, lr=3e-3, eps=1e-30, weight_decay=0.1)
MOMENTUM = functools.partial(SGD, lr=3e-2, momentum=0.9)
BOTH = pytest.mark.parametrize(
    ("make", "bound"), [(MOMENTUM, 1e-12), (ADAMW, 1e-8)], ids=["sgd", "adamw"]
)


def snapshot(model):
    return {
        "weights": copy.deepcopy(model.state_dict()),
        "vectors": {n: model.get_submodule(n).velora_vectors.clone() for n in LAYERS},
        "steps": {n: model.get_submodule(n).velora.steps for n in LAYERS},
    }


def in_order_of(paper, model):
    """The compressed model's parameters, coefficients where the reference has the weight."""
    own = dict(model.named_parameters())
    names = [name for name, _ in paper.named_parameters()]
    return [own.get(name.replace("weight", "coef"), own[name]) for name in names]


def same(a, b):
    return a["steps"] == b["steps"] and all(
        torch.equal(a[kind][key], b[kind][key])
        for kind in ("weights", "vectors")
        for key in a[kind]
    )


@BOTH
@pytest.mark.parametrize("fold_every", [1, 3])
def test_gradient_accumulation(make, bound, fold_every):
    def accumulate(model, optimizer, batch):
        optimizer.zero_grad()
        for micro in zip(*(part.split(1) for part in batch), strict=True):
            (loss_of(model, micro) / 2).backward()
        optimizer.step()

    models = pair(fold_every=fold_every, refresh_every=None)
    assert train_both(models, make, one_step=accumulate) < bound


@BOTH
@pytest.mark.parametrize("set_to_none", [True, False])
def test_clipping_sees_the_norm_of_the_dense_gradient(make, bound, set_to_none):
    norms = {}

    def clip(model, optimizer, batch):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        norms.setdefault(model, []).append(norm)
        optimizer.step()

    assert train_both(pair(vectors="per_group"), make, one_step=clip) < bound
    ours, theirs = (torch.stack(each) for each in norms.values())
    assert ours.min() > 0.2  # it did clip
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)


def test_parameter_groups_of_different_rate_and_decay():
    def make(parameters):
        parameters = list(parameters)
        return AdamW(
            [
                {"params": parameters[:3], "lr": 1e-3, "weight_decay": 0.5},
                {"params": parameters[3:], "lr": 1e-2, "weight_decay": 0.01},
            ],
            eps=1e-30,
        )

    model, paper = pair()
    start = copy.deepcopy(paper.state_dict())
    optimizers = make(in_order_of(paper, model)), make(paper.parameters())
    for batch in batches(30):
        step(model, optimizers[0], batch)
        step(paper, optimizers[1], batch)
    assert difference((model, paper), start) < 1e-8


@pytest.mark.parametrize("fold_every", [1, 4])
def test_learning_rate_schedules(fold_every):
    schedulers = {}

    def scheduled(model, optimizer, batch):
        if model not in schedulers:
            schedulers[model] = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 60)
        step(model, optimizer, batch)
        schedulers[model].step()

    assert train_both(pair(fold_every=fold_every), ADAMW, one_step=scheduled) < 1e-8


@BOTH
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_closures(make, bound, how):
    def with_closure(model, optimizer, batch):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        returned = (
            optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
        )
        assert returned.requires_grad

    assert train_both(pair(), make, one_step=with_closure) < bound


@BOTH
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(make, bound, reentrant):
    def checkpointed(model, optimizer, batch):
        optimizer.zero_grad()
        x, target = batch
        y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
        (y - target).square().mean().backward()
        optimizer.step()

    assert train_both(pair(), make, one_step=checkpointed) < bound


def test_autocast_trains_coefficients_and_folds_into_full_precision_weights():
    def cast(model, optimizer, batch):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()

    # Products of bfloat16 numbers: 2^-8 each, so a loose bound for the sum over 20 steps.
    assert train_both(pair(torch.float32), MOMENTUM, steps=20, one_step=cast) < 0.1


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    scalers = {}

    def scaled(model, optimizer, batch):
        scaler = scalers.setdefault(model, torch.amp.GradScaler("cpu", init_scale=2.0**10))
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    make = functools.partial(AdamW, lr=3e-3, eps=1e-10, weight_decay=0.1, fused=fused)
    bound = 1e-5  # found_inf and the scale are float32 numbers, and eps is not that small
    assert train_both(pair(), make, one_step=scaled) < bound


@pytest.mark.parametrize("choice", [{"init": "random", "refresh_every": 1}, {"init": "average"}])
@pytest.mark.parametrize("gradient", ["factored", "dense"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_changes_nothing(fused, gradient, choice):
    model, _ = pair(torch.float32, gradient=gradient, **choice)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    # Vectors that the step before has redrawn: first moments may follow them in a skipped step.
    first_moments = {"exp_avg"} if "refresh_every" in choice else set()
    for number, batch in enumerate(batches(5, torch.float32)):
        optimizer.zero_grad()
        loss = loss_of(model, batch) * (torch.inf if number == 2 else 1.0)
        scaler.scale(loss).backward()
        before = snapshot(model)
        state = copy.deepcopy(optimizer.state_dict()["state"])
        scaler.step(optimizer)
        scaler.update()
        assert same(before, snapshot(model)) == (number == 2)
        if number == 2:
            after = optimizer.state_dict()["state"]
            for key, entries in state.items():
                for entry in entries.keys() - first_moments:
                    assert torch.equal(after[key][entry], entries[entry])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@BOTH
def test_optimizer_state_round_trip(make, bound):
    seen = batches(20)
    models = pair()
    optimizers = [make(trainable(model)) for model in models]
    start = copy.deepcopy(models[1].state_dict())
    for number, batch in enumerate(seen):
        if number == 10:
            saved = copy.deepcopy(optimizers[0].state_dict())
            optimizers[0] = make(trainable(models[0]))
            optimizers[0].load_state_dict(saved)
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, batch)
    assert difference(models, start) < bound


def test_two_optimizers_of_one_model():
    def make(parameters):
        parameters = list(parameters)
        return parameters[::2], parameters[1::2]

    model, paper = pair()
    start = copy.deepcopy(paper.state_dict())
    optimizers = []
    for parameters in (in_order_of(paper, model), paper.parameters()):
        first, second = make(parameters)
        optimizers.append((SGD(first, lr=1e-2, weight_decay=0.1), ADAMW(second)))
    for batch in batches(30):
        for each, pairing in zip((model, paper), optimizers, strict=True):
            each.zero_grad()
            loss_of(each, batch).backward()
            for optimizer in pairing:
                optimizer.step()
    assert difference((model, paper), start) < 1e-8


def test_alternating_kinds_of_optimizer_fold_along_their_own_direction():
    models = pair(fold_every=4)
    start = copy.deepcopy(models[1].state_dict())
    optimizers = [(MOMENTUM(trainable(m)), ADAMW(trainable(m))) for m in models]
    for number, batch in enumerate(batches(24)):
        for model, both in zip(models, optimizers, strict=True):
            step(model, both[number // 3 % 2], batch)
    assert difference(models, start) < 1e-8


def test_evaluation_between_steps_changes_nothing():
    def evaluated(model, optimizer, batch):
        modes = [torch.no_grad, torch.inference_mode, contextlib.nullcontext]
        for mode in modes:
            with mode():
                model.eval()(batch[0] * 100)
        model.train()
        with torch.no_grad():
            model(batch[0] * -100)
        step(model, optimizer, batch)

    assert train_both(pair(), MOMENTUM, one_step=evaluated) < 1e-12


def test_layers_without_a_gradient_are_left_alone():
    model, _ = pair()
    optimizer = ADAMW(trainable(model))
    step(model, optimizer, batches(1)[0])
    optimizer.zero_grad()
    before = snapshot(model)
    optimizer.step()
    assert same(before, snapshot(model))


def test_restored_models_keep_all_that_was_trained():
    model, paper = pair(fold_every=None)
    start = copy.deepcopy(paper.state_dict())
    train_both((model, paper), ADAMW, steps=10)
    velora.restore(model)
    assert difference((model, paper), start) < 1e-8
    assert not any("coef" in name for name, _ in model.named_parameters())
