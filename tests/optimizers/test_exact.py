"""Fifty steps on coefficients end where the dense gradient of the paper ends."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RMSprop

from .dense import LR, pair, train_both

LINEAR = {
    "sgd": functools.partial(SGD, lr=LR),
    "sgd-foreach": functools.partial(SGD, lr=LR, foreach=True),
    "sgd-fused": functools.partial(SGD, lr=LR, fused=True, weight_decay=0.1),
    "sgd-momentum": functools.partial(SGD, lr=LR, momentum=0.9),
    "sgd-nesterov": functools.partial(SGD, lr=LR, momentum=0.9, nesterov=True),
    "sgd-dampening": functools.partial(SGD, lr=LR, momentum=0.9, dampening=0.3),
    "sgd-maximize": functools.partial(SGD, lr=1e-3, momentum=0.5, maximize=True),
    "sgd-decay": functools.partial(SGD, lr=LR, weight_decay=0.1),
    "sgd-decay-maximize": functools.partial(SGD, lr=1e-3, weight_decay=0.1, maximize=True),
}

# eps is outside the square root in all of these (for Adamax inside the maximum): with 1e-30 it
# vanishes beside the gradient, and |v| cancels. What the default does is in docs/results/eps.md.
EPS = 1e-30
RATE = 3e-3
INVARIANT = {
    "adam": functools.partial(Adam, lr=RATE, eps=EPS),
    "adam-decoupled": functools.partial(
        Adam, lr=RATE, eps=EPS, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "adamw": functools.partial(AdamW, lr=RATE, eps=EPS, weight_decay=0.1),
    "adamw-loop": functools.partial(AdamW, lr=RATE, eps=EPS, weight_decay=0.1, foreach=False),
    "adamw-foreach": functools.partial(AdamW, lr=RATE, eps=EPS, weight_decay=0.1, foreach=True),
    "adamw-fused": functools.partial(AdamW, lr=RATE, eps=EPS, weight_decay=0.1, fused=True),
    "adamw-amsgrad": functools.partial(AdamW, lr=RATE, eps=EPS, amsgrad=True),
    "adamw-maximize": functools.partial(AdamW, lr=RATE, eps=EPS, weight_decay=0.1, maximize=True),
    "adamw-tensor-lr": functools.partial(
        AdamW, lr=torch.tensor(RATE), eps=EPS, weight_decay=0.1, foreach=False
    ),
    "adamax": functools.partial(Adamax, lr=RATE, eps=EPS),
    "adamax-foreach": functools.partial(Adamax, lr=RATE, eps=EPS, foreach=True),
    "rmsprop": functools.partial(RMSprop, lr=RATE, eps=EPS),
    "rmsprop-centered": functools.partial(RMSprop, lr=RATE, eps=EPS, centered=True),
    "rmsprop-momentum": functools.partial(RMSprop, lr=RATE, eps=EPS, momentum=0.9),
    "rmsprop-both": functools.partial(RMSprop, lr=RATE, eps=EPS, centered=True, momentum=0.9),
    "nadam": functools.partial(NAdam, lr=RATE, eps=EPS),
    "nadam-decoupled": functools.partial(
        NAdam, lr=RATE, eps=EPS, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "adagrad": functools.partial(Adagrad, lr=RATE, eps=EPS, lr_decay=0.01),
}

CHOICES = {
    "average-shared": {"init": "average"},
    "average-per-group": {"init": "average", "vectors": "per_group"},
    "random-per-group": {"init": "random", "vectors": "per_group", "scale": 0.5},
    "svd-shared": {"init": "svd"},
}


# An optimizer sees coefficients, whatever v they belong to: each is tried with the choice of v that
# has every part, and each choice with one optimizer of either kind.
RICHEST = CHOICES["random-per-group"]


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_linear_optimizers_equal_the_dense_gradient(make):
    assert train_both(pair(**RICHEST), make) < 1e-12


@pytest.mark.parametrize("make", INVARIANT.values(), ids=INVARIANT)
def test_scale_invariant_optimizers_equal_the_dense_gradient(make):
    assert train_both(pair(**RICHEST), make) < 1e-8


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_every_choice_of_vectors(choice):
    assert train_both(pair(**choice), LINEAR["sgd-momentum"]) < 1e-12
    assert train_both(pair(**choice), INVARIANT["adamw"]) < 1e-8


@pytest.mark.parametrize("fold_every", [4, None], ids=str)
@pytest.mark.parametrize(
    ("make", "bound"),
    [
        (LINEAR["sgd-momentum"], 1e-12),
        (LINEAR["sgd-decay"], 1e-12),
        (INVARIANT["adamw"], 1e-8),
        (INVARIANT["rmsprop-both"], 1e-8),
    ],
    ids=["sgd-momentum", "sgd-decay", "adamw", "rmsprop-both"],
)
def test_folding_late_or_never_is_as_exact(make, bound, fold_every):
    assert train_both(pair(fold_every=fold_every), make) < bound


def test_the_dense_gradient_mode_is_the_reference_too():
    assert train_both(pair(gradient="dense"), LINEAR["sgd-momentum"]) < 1e-12


def test_the_dense_gradient_mode_takes_any_optimizer():
    make = functools.partial(torch.optim.Adafactor, lr=1e-2)
    assert train_both(pair(gradient="dense"), make, steps=10) < 1e-8
