"""New vectors: second moments stay, first moments are the projection of the dense ones."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.utils.checkpoint import checkpoint

from .dense import LAYERS, batches, loss_of, pair, trainable

CHOICES = {
    "random-per-group": {"init": "random", "vectors": "per_group"},
    "random-shared": {"init": "random"},
    "average-per-group": {"init": "average", "vectors": "per_group"},
    "average-shared": {"init": "average"},
    "svd-shared": {"init": "svd"},
}
OPTIMIZERS = {
    "sgd-momentum": (functools.partial(SGD, lr=1e-2, momentum=0.9), {"momentum_buffer": "v"}),
    "adam": (functools.partial(Adam, lr=1e-2), {"exp_avg": "v"}),
    "adamw-amsgrad": (functools.partial(AdamW, lr=1e-2, amsgrad=True), {"exp_avg": "v"}),
    "rmsprop": (
        functools.partial(RMSprop, lr=1e-2, momentum=0.9, centered=True),
        {"grad_avg": "v", "momentum_buffer": "sign"},
    ),
}


def dense(moment_OG, e_GM):
    """The moment that an optimizer of the dense gradient would have: m (x) e, (O, G, M)."""
    return moment_OG[:, :, None] * e_GM


def projected(dense_OGM, e_GM):
    """Coordinates of its orthogonal projection on the new e of each group, by least squares."""
    columns = [
        torch.linalg.lstsq(e[:, None], part.T).solution[0]
        if e.any()
        else part.new_zeros(part.shape[0])
        for part, e in zip(dense_OGM.transpose(0, 1), e_GM, strict=True)
    ]
    return torch.stack(columns, dim=1)


class Spy:
    """The optimizer's state as it is when the update begins, after everything of velora's."""

    def __init__(self, optimizer):
        self.optimizer, self.state = optimizer, {}
        optimizer.register_step_pre_hook(self)  # runs after the global hooks

    def __call__(self, optimizer, args, kwargs):
        self.state = copy.deepcopy(dict(optimizer.state))

    def of(self, coef):
        index = [id(p) for p in self.optimizer.param_groups[0]["params"]].index(id(coef))
        return list(self.state.values())[index]


def one(model, optimizer, batch, closure=False):
    def evaluate():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    if closure:
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize(("make", "moments"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_first_moments_are_projected_and_second_moments_kept(make, moments, choice):
    model, _ = pair(refresh_every=3, **choice)
    optimizer = make(trainable(model))
    seen = batches(5)
    for batch in seen[:2]:
        one(model, optimizer, batch)
    vectors = {name: model.get_submodule(name).velora_vectors.clone() for name in LAYERS}
    one(model, optimizer, seen[2])
    before = {n: copy.deepcopy(optimizer.state[model.get_submodule(n).coef]) for n in LAYERS}
    spy = Spy(optimizer)
    one(model, optimizer, seen[3])
    for name in LAYERS:
        layer = model.get_submodule(name)
        old, new = vectors[name], layer.velora_vectors
        assert not torch.equal(old, new)
        after = spy.of(layer.coef)
        for key, value in before[name].items():
            if key not in moments:
                assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)), key
                continue
            signs = moments[key] == "sign"
            e_old, e_new = (old.sign(), new.sign()) if signs else (old, new)
            due = projected(dense(value, e_old), e_new)
            torch.testing.assert_close(after[key], due, rtol=1e-11, atol=1e-13)
    # Only once: the next step starts from moments as the optimizer left them.
    left = copy.deepcopy(optimizer.state[model.up.coef])
    one(model, optimizer, seen[4])
    for key in moments:
        assert torch.equal(spy.of(model.up.coef)[key], left[key])


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_moments_follow_vectors_drawn_inside_a_closure(choice):
    ends = []
    for closure in (False, True):
        model, _ = pair(refresh_every=2, **choice)
        optimizer = AdamW(trainable(model), lr=1e-2)
        for batch in batches(8):
            one(model, optimizer, batch, closure)
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key])


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("fold_every", [1, 3], ids=lambda value: f"fold-every-{value}")
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_vectors_never_change_within_an_accumulation(choice, fold_every, reentrant):
    model, _ = pair(refresh_every=2, fold_every=fold_every, **choice)
    optimizer = AdamW(trainable(model), lr=1e-2)
    history = []
    for x, target in batches(6):
        optimizer.zero_grad()
        seen = []
        for micro in range(2):
            part = x[micro : micro + 1].clone().requires_grad_()
            if reentrant is None:
                y = model(part)
            else:
                y = checkpoint(model, part, use_reentrant=reentrant)
            (y - target[micro : micro + 1]).square().mean().backward()
            seen.append(model.up.velora_vectors.clone())
        assert torch.equal(*seen)
        history.append(seen[0])
        optimizer.step()
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(history)]
    assert changes == [False, True, False, True, False]


@pytest.mark.parametrize("init", ["running_average", "batch_average"])
def test_averages_move_once_for_each_step(init):
    model, _ = pair(init=init)
    optimizer = AdamW(trainable(model), lr=1e-2)
    draws = []
    for x, target in batches(4):
        optimizer.zero_grad()
        for micro in range(2):
            loss_of(model, (x[micro : micro + 1], target[micro : micro + 1])).backward()
            draws.append(model.up.velora.draws)
        optimizer.step()
    assert draws == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_pending_coefficients_are_folded_along_the_old_vectors_first(choice):
    """Folding at every step or late gives the same weights, redraws in between included."""
    ends = []
    for fold_every in (1, 5):
        model, _ = pair(refresh_every=2, fold_every=fold_every, **choice)
        optimizer = SGD(trainable(model), lr=1e-2, momentum=0.9, dampening=0.1)
        for batch in batches(12):
            one(model, optimizer, batch)
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_skipped_step_does_not_count(choice, fused):
    """A run with a step that GradScaler skips ends where the run without that batch ends."""
    ends = []
    for skips in (True, False):
        model, _ = pair(torch.float32, refresh_every=2, **choice)
        optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=0.999)
        for number, batch in enumerate(batches(9, torch.float32)):
            if number == 4:
                if not skips:
                    continue
                # A batch that other steps see too: redraws from data look at it.
                batch = batches(6, torch.float32)[5]
            optimizer.zero_grad()
            loss = loss_of(model, batch) * (torch.inf if number == 4 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            if number != 4:
                scaler.update()
            else:
                scaler.update(4.0)
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], rtol=1e-5, atol=1e-6)


def test_moments_of_an_optimizer_without_state_are_not_needed():
    model, _ = pair(refresh_every=1, init="random")
    optimizer = SGD(trainable(model), lr=1e-2)
    for batch in batches(3):
        one(model, optimizer, batch)
    assert model.up.velora.draws == 4


def test_second_moments_are_kept_over_a_redraw_to_the_opposite_vector():
    """v -> -v is no change at all: the run is the same as with the old vector."""
    ends = []
    for flip in (False, True):
        model, _ = pair(init="random")
        optimizer = Adam(trainable(model), lr=1e-2)
        for number, batch in enumerate(batches(6)):
            if number == 3 and flip:
                for name in LAYERS:
                    layer = model.get_submodule(name)
                    layer.velora_vectors = -layer.velora_vectors
                    layer.velora_turn = -layer.velora_vectors.square().sum(1)
                    layer.velora_sign_turn = layer.velora_turn
            one(model, optimizer, batch)
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-10, atol=1e-12)
