"""Optimizers that project gradients train coefficients beside them, as AdamW does."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import velora_torch as velora
from velora_torch.peers.flora import Flora

from .dense import pair, step, train_both
from .test_refusals import refused

galore_torch = pytest.importorskip("galore_torch")
apollo_torch = pytest.importorskip("apollo_torch")

GALORE = functools.partial(galore_torch.GaLoreAdamW, no_deprecation_warning=True)
KINDS = {
    "galore": GALORE,
    "apollo": apollo_torch.APOLLOAdamW,
    "apollos-galore": apollo_torch.GaLoreAdamW,
    "flora": Flora,
}
RANKED = {"rank": 2, "update_proj_gap": 2}
ALIKE = {**RANKED, "scale": 1.0, "proj_type": "std"}
PROJECTED = {
    "galore": ALIKE,
    "apollo": {**ALIKE, "scale_type": "channel", "proj": "random"},
    "apollos-galore": ALIKE,
    "flora": RANKED,
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_without_a_rank_they_equal_the_dense_gradient(kind):
    make = functools.partial(KINDS[kind], lr=3e-3, eps=1e-30, weight_decay=0.1)
    bound = 1e-5 if kind == "flora" else 1e-8  # its moments are in float32
    models = pair(init="random", vectors="per_group", scale=0.5)
    assert train_both(models, make) < bound


@kinds
def test_plain_layers_are_projected_beside_compressed_ones(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))
    velora.compress(model, velora.VeloraConfig(targets=["0"], num_groups=3, track_delta=False))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = [p for p in model.parameters() if p.requires_grad and p is not model[2].weight]
    optimizer = KINDS[kind](
        [{"params": plain}, {"params": [model[2].weight], **PROJECTED[kind]}], lr=1e-2
    )
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, target = (torch.randn(6, width, generator=generator) for width in (12, 5))
        step(model, optimizer, (x, target))
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert not torch.equal(model.state_dict()[name], start[name])
    assert not model[0].coef.any()  # folded
    moment = "momentum" if kind == "flora" else "exp_avg"
    assert optimizer.state[model[2].weight][moment].numel() < model[2].weight.numel()
    assert optimizer.state[model[0].coef]["exp_avg"].shape == model[0].coef.shape


@kinds
def test_projected_coefficients_are_refused(kind):
    def make(parameters):
        return KINDS[kind]([{"params": parameters, **PROJECTED[kind]}], lr=1e-3)

    refused(make, "projects their gradient; leave them out of the group with a rank")


@kinds
def test_first_moments_turn_with_new_vectors(kind):
    """As torch's AdamW's do: without decay, whose order differs, both end alike."""
    ends = []
    for make in (KINDS[kind], torch.optim.AdamW):
        torch.manual_seed(0)
        config = velora.VeloraConfig(
            num_groups=4, init="rademacher", vectors="per_group", refresh_every=2, seed=0
        )
        model = velora.compress(nn.Sequential(nn.Linear(12, 8)), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make(trained, lr=1e-2, eps=1e-30, weight_decay=0.0)
        for seed in range(7):
            generator = torch.Generator().manual_seed(seed)
            x, target = (torch.randn(6, width, generator=generator) for width in (12, 8))
            step(model, optimizer, (x, target))
        ends.append(model[0].weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
