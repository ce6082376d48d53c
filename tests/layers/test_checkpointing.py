"""Under gradient checkpointing: the same gradients, and no product that nobody needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from velora_torch.subtoken import factored

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


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every projection of an input."""
    calls: list[None] = []
    original = factored.project

    def project(x: Tensor, v_GM: Tensor, shared: bool = False) -> Tensor:
        calls.append(None)
        return original(x, v_GM, shared)

    monkeypatch.setattr(factored, "project", project)
    return calls


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("make", KINDS)
def test_the_first_pass_does_not_project(projections: list[None], make: Make, needs_x: bool):
    """z would be dropped."""
    model, x = block(make, "factored"), torch.randn(T, D, requires_grad=needs_x)
    model(x)
    projections.clear()
    y = checkpoint(model, x, use_reentrant=False)
    assert len(projections) == 0
    y.sum().backward()
    assert len(projections) == 1


Run = Callable[[nn.Module, Tensor], Tensor]


def inside(run: Run) -> Run:
    """Checkpointed."""
    return lambda model, x: checkpoint(partial(run, model), x, use_reentrant=False)  # type: ignore[no-any-return]


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y


def offloading(model: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return plainly(model, x)


def differentiating(model: nn.Module, x: Tensor) -> Tensor:
    y = plainly(model, x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    return y + dx[:, :O]


def selecting(model: nn.Module, x: Tensor) -> Tensor:
    """Keeps the results of all products of matrices, in the order in which they are computed."""
    kept = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    y: Tensor = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    return y


@pytest.mark.parametrize(
    ("run", "plain"),
    [
        (inside(inside(plainly)), plainly),
        (inside(offloading), plainly),
        (offloading, plainly),
        (lambda model, x: offloading(partial(inside(plainly), model), x), plainly),
        (inside(differentiating), differentiating),
        (selecting, plainly),
        (inside(selecting), plainly),
    ],
    ids=[
        *("nested", "offloading inside", "offloading", "offloading outside"),
        *("gradients inside", "selective", "selective inside"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_whoever_keeps_z_gets_it(gradient: str, dtype: torch.dtype, run: Run, plain: Run):
    """The first pass may leave it out only where checkpointing itself drops it."""
    model = block(nn.Linear, gradient).to(dtype)
    x = torch.randn(T, D).to(dtype).requires_grad_()
    model(x)
    other = copy.deepcopy(model)
    expected = gradients(model, plain(model, x), x)
    actual = gradients(other, run(other, x), x)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 0.0)


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
