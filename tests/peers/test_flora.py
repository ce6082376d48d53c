"""FLoRA against its equations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from velora_torch.peers.flora import Flora
from velora_torch.subtoken.vectors import layer_seed


def drawn(step, gap=3, rank=4, n=6, seed=5, place=0):
    generator = torch.Generator().manual_seed(layer_seed(f"flora {place}", seed, step // gap))
    return torch.randn(rank, n, generator=generator) / rank**0.5


def test_steps_are_those_of_the_paper():
    """The equations of the module's docstring, written out, over two draws."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 6))
    settings = {"params": [weight], "rank": 4, "update_proj_gap": 3, "seed": 5}
    optimizer = Flora([settings], lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    expected, momentum = weight.detach().clone(), torch.zeros(5, 4)
    rows, columns = torch.zeros(5), torch.zeros(6)
    for step in range(8):
        grad = torch.randn(5, 6)
        weight.grad = grad.clone()
        optimizer.step()
        a = drawn(step)
        if step in (3, 6):
            momentum = momentum @ drawn(step - 1) @ a.T
        momentum = 0.9 * momentum + 0.1 * grad @ a.T
        rows = 0.99 * rows + 0.01 * (grad**2).mean(1)
        columns = 0.99 * columns + 0.01 * (grad**2).mean(0)
        r, c = rows / (1 - 0.99 ** (step + 1)), columns / (1 - 0.99 ** (step + 1))
        second = r[:, None] * c[None, :] / r.mean()
        move = momentum @ a / (1 - 0.9 ** (step + 1)) / (second.sqrt() + 1e-8)
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * move
        torch.testing.assert_close(weight.detach(), expected)


def test_other_parameters_take_adamw():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(7))]
    theirs = copy.deepcopy(ours)
    first = Flora(ours, lr=0.01, weight_decay=0.1)
    second = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        first.step()
        second.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_momentum_is_small():
    weight = nn.Parameter(torch.randn(64, 128))
    weight.grad = torch.randn_like(weight)
    optimizer = Flora([{"params": [weight], "rank": 4}])
    optimizer.step()
    state = optimizer.state[weight]
    assert sum(v.numel() for v in state.values() if torch.is_tensor(v)) == 64 * 4 + 64 + 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on(dtype):
    """States stay float32, whatever the weights are."""

    def model_and_optimizer():
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(5, 6, dtype=dtype)) for _ in range(2)]
        projected = {"params": weights[:1], "rank": 2, "update_proj_gap": 2}
        return weights, Flora([projected, {"params": weights[1:]}])

    def go(weights, optimizer, steps):
        for step in steps:
            for weight in weights:
                weight.grad = torch.full_like(weight, float(step + 1) / 3).tril()
            optimizer.step()

    whole, optimizer = model_and_optimizer()
    go(whole, optimizer, range(6))
    first, optimizer = model_and_optimizer()
    go(first, optimizer, range(3))
    second, again = model_and_optimizer()
    for mine, its in zip(second, first, strict=True):
        mine.data.copy_(its.data)
    saved = optimizer.state_dict()
    again.load_state_dict(saved)
    kept = copy.deepcopy(saved["state"])
    go(second, again, range(3, 6))
    for mine, its in zip(whole, second, strict=True):
        assert torch.equal(mine, its)
    for number, state in kept.items():  # what was saved is not written to
        for name, value in state.items():
            assert not torch.is_tensor(value) or torch.equal(value, saved["state"][number][name])


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Flora([{"params": [nn.Parameter(torch.zeros(2, 2))], "rank": 0}])
