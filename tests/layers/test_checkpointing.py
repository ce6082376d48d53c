"""Under gradient checkpointing: the same gradients, and no product that nobody needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ..closeness import assert_close
from .cases import GRADIENTS, KINDS, Make, compress

T, D, G, O = 40, 96, 8, 24  # noqa: E741


def block(make: Make, gradient: str) -> nn.Sequential:
    """Its last layer is compressed."""
    return nn.Sequential(nn.Linear(D, D), nn.GELU(), compress(make(D, O), G, gradient=gradient))


def gradients(model: nn.Module, y: Tensor, x: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), [x, *trained]))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
def test_gradients_are_the_same(make: Make, gradient: str):
    model, x = block(make, gradient).double(), torch.randn(T, D).double().requires_grad_()
    model(x)  # chooses vectors
    expected = gradients(model, model(x), x)
    actual = gradients(model, checkpoint(model, x, use_reentrant=False), x)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-14)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_last_product_of_a_block_is_not_computed_again(gradient: str):
    """Its output is no input of the backward pass; that of a plain last layer is spared too."""
    model, x = block(nn.Linear, gradient), torch.randn(T, D, requires_grad=True)
    model(x)
    plain = 2 * T * D * (D + O)
    with FlopCounterMode(display=False) as forward:
        y = checkpoint(model, x, use_reentrant=False)
    projection = forward.get_total_flops() - plain
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    first, last = 2 * (2 * T * D * D), 2 * T * O * D + 2 * T * O * G  # dX and dW of both
    assert backward.get_total_flops() == first + last + 2 * T * D * D + projection


def test_an_input_may_be_changed_in_place_afterwards():
    """Checkpointing or not, x is not kept."""
    layer, x = compress(nn.Linear(D, O), G), torch.randn(T, D, requires_grad=True)
    layer(x)

    def run(x: Tensor, change: bool) -> Tensor:
        h = x * 2
        y = layer(h)
        if change:
            h.add_(1)
        return y

    expected = gradients(layer, checkpoint(run, x, False, use_reentrant=False), x)
    actual = gradients(layer, checkpoint(run, x, True, use_reentrant=False), x)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 0.0)
