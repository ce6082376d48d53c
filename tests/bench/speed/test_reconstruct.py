"""The published way gives the reference's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.closeness import assert_close
from velora_torch.bench.speed.reconstruct import ReconstructLinear, reconstruct_then_multiply
from velora_torch.subtoken import reference


def layer(features: int, groups: int, bias: bool = True) -> ReconstructLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 6, bias=bias).double()).train()
    (made,) = reconstruct_then_multiply(model, groups)
    assert isinstance(made, ReconstructLinear)
    return made


@pytest.mark.parametrize("features", [12, 10], ids=["even", "padded"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=["2-D", "3-D"])
def test_gradients_are_those_of_the_reference(features, bias, shape):
    made = layer(features, 4, bias)
    x = (torch.randn(*shape, features, dtype=torch.float64) + 0.2).requires_grad_()
    dY = torch.randn(*shape, 6, dtype=torch.float64)
    y = made(x)
    assert_close(y, nn.functional.linear(x, made.weight, made.bias), 1e-14)
    y.backward(dY)
    assert made.v_M is not None
    assert_close(made.v_M.norm(), torch.tensor(1.0), 1e-6)
    v_GM = made.v_M.expand(4, -1)
    dX, dW, db = reference.linear_gradients(x.detach(), made.weight.detach(), dY, v_GM)
    assert_close(x.grad, dX, 1e-12)
    assert_close(made.weight.grad, dW, 1e-12)
    if bias:
        assert_close(made.bias.grad, db, 1e-12)


def test_the_vector_is_the_mean_sub_token_of_the_first_batch():
    made = layer(12, 4)
    first, second = torch.randn(2, 5, 12, dtype=torch.float64).unbind()
    made.eval()(second)
    assert made.v_M is None
    made.train()(first)
    made(second)
    mean = reference.group(first, 4, 3).mean((0, 1))
    assert made.v_M is not None
    assert_close(made.v_M, mean / mean.norm(), 1e-6)


def test_z_is_kept_and_the_input_is_not():
    made, kept = layer(12, 4), []
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    made(x)  # draws
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x)
    assert sorted(tuple(t.shape) for t in kept) == [(3,), (5, 4), (6, 12)]


def test_the_head_of_a_model_stays_plain():
    pytest.importorskip("transformers")
    from tests.tiny_models import llama

    model = reconstruct_then_multiply(llama(), 4)
    changed = [name for name, m in model.named_modules() if isinstance(m, ReconstructLinear)]
    assert len(changed) == 2 * 7
    assert type(model.lm_head) is nn.Linear
