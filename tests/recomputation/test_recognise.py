"""Modules are told apart by what they do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F

from velora_torch.memory.fake import FakeWorld
from velora_torch.recomputation import left_alone, recompute, recomputed

D = 12


class ScaledNorm(nn.Module):
    """1 + w, a bias, and statistics in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, keepdim=True) + 1e-6)
        return (y * (1 + self.scale.float()) + self.shift.float()).type_as(x)


class UnitNorm(nn.Module):
    """No parameters."""

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)


class SquaredGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.5 * x) + 0.1 * torch.sin(x)


class AcrossRows(ScaledNorm):
    """Looks like a norm, but subtracts the mean of all rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


class Counting(ScaledNorm):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Remembering(ScaledNorm):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.history.append(float(x.detach().mean()))
        return super().forward(x)


class Moving(ScaledNorm):
    """Has a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().flatten(0, -2).mean(0)
        return super().forward(x - self.mean)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(0.5)
        return F.gelu(x)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x.detach())


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.silu(x) * y


class _FusedNorm(Function):
    """Keeps its input and one number for each row, as fused kernels do."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        dz = dy * weight
        dx = scale * dz - x * scale**3 * (dz * x).mean(-1, keepdim=True)
        return dx, (dy * x * scale).flatten(0, -2).sum(0)


class FusedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return _FusedNorm.apply(x, self.weight)


RECOGNISED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "custom-norm": (ScaledNorm, "norm"),
    "no-parameters": (UnitNorm, "norm"),
    "custom-activation": (SquaredGate, "activation"),
    "silu": (nn.SiLU, "activation"),
    "gelu": (nn.GELU, "activation"),
    "gelu-tanh": (lambda: nn.GELU(approximate="tanh"), "activation"),
    "mish": (nn.Mish, "activation"),
    "softplus": (nn.Softplus, "activation"),
    "leaky-relu": (nn.LeakyReLU, "activation"),
}
ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (nn.Dropout, "another result each time"),
    "dropout-0": (lambda: nn.Dropout(0.0), "returns its input"),
    "identity": (nn.Identity, "returns its input"),
    "batch-norm": (lambda: nn.BatchNorm1d(D), "cannot be run"),
    "group-norm": (lambda: nn.GroupNorm(2, D), "cannot be run"),
    "layer-norm": (lambda: nn.LayerNorm(D), "keeps little but its input"),
    "fused-norm": (FusedNorm, "keeps little but its input"),
    "softmax": (lambda: nn.Softmax(-1), "keeps little"),
    "softmax-of-columns": (lambda: nn.Softmax(1), "neither elementwise nor"),
    "relu": (nn.ReLU, "keeps its output alone"),
    "tanh": (nn.Tanh, "keeps its output alone"),
    "in-place-relu": (lambda: nn.ReLU(inplace=True), "in place"),
    "glu": (nn.GLU, "another shape"),
    "flatten": (nn.Flatten, "another shape"),
    "loss": (nn.MSELoss, "cannot be run on one tensor alone"),
    "two-inputs": (TwoInputs, "cannot be run on one tensor alone"),
    "in-place": (InPlace, "in place"),
    "detached": (Detached, "does not depend on its input"),
    "across-rows": (AcrossRows, "neither elementwise nor"),
    "counting": (Counting, "changes its own state"),
    "remembering": (Remembering, "changes its own state"),
    "moving-average": (Moving, "another result each time"),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_recognised(name: str):
    make, kind = RECOGNISED[name]
    model = nn.Sequential(nn.Linear(D, D), make(), nn.Linear(D, D)).double()
    plain = copy.deepcopy(model)
    x = torch.randn(3, 4, D, dtype=torch.float64)
    assert recomputed(recompute(model)) == {"1": kind}
    assert isinstance(model[1], type(plain[1]))
    outputs = [m(x.clone().requires_grad_()) for m in (model, plain)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)
    assert left_alone(model) == {}


@pytest.mark.parametrize("name", ALONE)
def test_left_alone(name: str):
    make, reason = ALONE[name]
    model = nn.Sequential(nn.Linear(D, D), make())
    before = copy.deepcopy(model)
    assert recomputed(recompute(model)) == {}
    assert type(model[1]) is type(before[1])
    assert reason in left_alone(model)["1"]
    assert str(vars(model[1])) == str(vars(before[1])), "running it has left a trace"


@pytest.mark.parametrize(
    "make",
    [nn.Linear, nn.Bilinear, nn.Embedding, nn.Conv1d],
    ids=["linear", "bilinear", "embedding", "convolution"],
)
def test_matrices_are_no_candidates(make: Callable[..., nn.Module]):
    model = nn.Sequential(make(*(3,) * (2 if make in (nn.Linear, nn.Embedding) else 3)))
    recompute(model)
    assert recomputed(model) == {}
    assert left_alone(model) == {}


def test_a_replaced_forward_is_left_alone():
    model = nn.Sequential(ScaledNorm())
    model[0].forward = lambda x: x
    assert recomputed(recompute(model)) == {}
    assert "replaced" in left_alone(model)["0"]


def test_models_without_numbers():
    """On the meta device, or fake: recognised all the same."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(D, D), ScaledNorm(), nn.SiLU())
    assert recomputed(recompute(model)) == {"1": "norm", "2": "activation"}
    world = FakeWorld()
    twin = world.model(nn.Sequential(nn.Linear(D, D), ScaledNorm(), nn.SiLU()))
    assert recomputed(recompute(twin)) == {"1": "norm", "2": "activation"}
    with world:
        twin(torch.zeros(3, D)).sum().backward()
    assert twin[1].scale.grad.shape == (D,)


def test_other_inputs_take_the_original_forward():
    class Optional(ScaledNorm):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return y if residual is None else y + residual

    model, x = Optional(), torch.randn(2, D)
    assert recomputed(recompute(nn.Sequential(model))) == {"0": "norm"}
    assert torch.equal(model(x, residual=x), model(x) + x)
    assert torch.equal(model(x, x), model(x) + x)


def test_all_of_a_shared_module():
    act = nn.SiLU()
    model = nn.ModuleDict({"a": nn.Sequential(act), "b": nn.Sequential(act)})
    assert recomputed(recompute(model)) == {"a.0": "activation"}
    assert model["a"][0] is model["b"][0]


def test_a_frozen_norm():
    norm = ScaledNorm().requires_grad_(False)
    assert recomputed(recompute(nn.Sequential(norm))) == {"0": "norm"}
