"""The vectors of an analysis are those that a compressed layer has at the same moment."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tests import tiny_models
from tests.closeness import assert_close
from velora_torch import VeloraConfig, compress
from velora_torch.analysis.choices import Choice, LayerVectors, choices
from velora_torch.config import Init

ALL = choices([0, 3])


def test_every_choice_of_the_configuration_is_there():
    assert len(set(ALL)) == 2 * len(get_args(Init))
    for choice in ALL:
        VeloraConfig(init=choice.init, vectors=choice.vectors)
    assert [choice.label for choice in ALL[:: len(get_args(Init))]] == [
        "average",
        "average, per group",
    ]


def test_at_the_first_step_moving_averages_are_no_choices_of_their_own():
    assert {choice.init for choice in choices([0])} == {"average", "random", "rademacher", "svd"}


@pytest.mark.parametrize("choice", ALL, ids=lambda choice: choice.label)
@pytest.mark.parametrize("groups", [4, 3], ids=["even", "padded"])
def test_vectors_are_those_of_a_layer_that_trains(choice, groups):
    net = tiny_models.net(width=16)
    config = VeloraConfig(
        targets=["first"],
        num_groups=groups,
        init=choice.init,
        vectors=choice.vectors,
        seed=3,
        running_decay=0.7,
    )
    compress(net, config)
    seen = LayerVectors("first", 3, 0.7)
    size = -(-16 // groups)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    net.train()
    for x in tiny_models.batches(4):
        tiny_models.loss_of(net, x).backward()
        seen.see_mean(x.mean(dim=0))
        seen.see_tokens(x, [(groups, size)])
        expected = net.first.velora_vectors
        assert_close(seen.vectors(choice, groups, size), expected, 2e-5)
        optimizer.step()
        optimizer.zero_grad()


def test_a_batch_that_is_not_finite_does_not_spoil_the_running_average():
    seen = LayerVectors("first", 0, 0.9)
    seen.see_mean(torch.ones(4))
    seen.see_mean(torch.full((4,), torch.nan))
    v_GM = seen.vectors(Choice("running_average", "shared"), 2, 2)
    assert_close(v_GM, torch.full((2, 2), 0.5**0.5).double(), 1e-6)
