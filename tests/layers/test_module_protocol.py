"""A compressed layer is a module like others: copies, casts, pickles, hooks."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.layers.watching import LIVE

from ..closeness import assert_bitwise
from .cases import GRADIENTS, KINDS, Make, Renamed, compress


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


COPIES = [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(pickled, id="pickle"),
]
SETTINGS = [
    pytest.param({}, id="average"),
    pytest.param({"init": "running_average"}, id="running"),
    pytest.param({"init": "random", "refresh_every": 2}, id="random"),
    pytest.param({"fold_every": 3}, id="pending"),
    pytest.param({"gradient": "dense"}, id="dense"),
]


def batch(seed: int) -> Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(seed)) + 0.3


def train(model: nn.Module, seeds: range) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for seed in seeds:
        optimizer.zero_grad()
        model(batch(seed)).square().mean().backward()
        optimizer.step()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(99))


@pytest.mark.parametrize("trained", [0, 2], ids=["fresh", "trained"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("make", KINDS)
def test_a_copy_trains_alike_and_alone(
    make: Make, make_copy: Any, settings: dict[str, Any], trained: int
):
    layer = compress(make(10, 6), **settings)
    train(layer, range(trained))
    other = make_copy(layer)
    assert type(other) is type(layer)
    assert other.velora is not layer.velora
    assert other.velora.counters() == layer.velora.counters()
    assert other in LIVE
    assert_bitwise(output(other), output(layer))

    before = output(layer)
    train(other, range(10, 13))
    assert_bitwise(output(layer), before)
    assert not torch.equal(output(other), before)
    train(layer, range(10, 13))
    assert_bitwise(output(layer), output(other))
    assert_bitwise(layer.velora_vectors, other.velora_vectors)


@pytest.mark.parametrize("make_copy", COPIES)
def test_a_copy_can_be_restored(make_copy: Any):
    model = nn.Sequential(Renamed(10, 6))
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    train(model, range(2))
    other = make_copy(model)
    velora_torch.restore(other)
    assert type(other[0]) is Renamed
    assert isinstance(model[0], CompressedLayer)
    assert_bitwise(output(other), output(model))


def test_a_pickle_trains_in_another_process(tmp_path: Path):
    """There, compress is never called: the optimizer's steps must be watched all the same."""
    layer = compress(nn.Linear(10, 6))
    layer(batch(0))
    path = tmp_path / "layer.pt"
    torch.save(layer, path)
    program = f"""
import torch
layer = torch.load({str(path)!r}, weights_only=False)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
layer(torch.ones(3, 10)).sum().backward()
optimizer.step()
print(layer.velora.direction, layer.velora.folds)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["sign", "1"], run.stderr


def test_shared_modules_stay_shared_in_a_copy():
    shared = nn.Linear(10, 10)
    model = velora_torch.compress(nn.Sequential(shared, shared), VeloraConfig(num_groups=2))
    other = copy.deepcopy(model)
    assert other[0] is other[1]
    train(other, range(1))
    assert other[0].velora.steps == 1


# ------------------------------------------------------------------ casts


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=["bf16", "fp16", "fp64"],
)
def test_casts_keep_vectors_and_coefficients_wide(
    dtype: torch.dtype, wide: torch.dtype, settings: dict[str, Any]
):
    layer = compress(nn.Linear(10, 6), **settings)
    train(layer, range(2))
    layer(batch(5)).sum().backward()
    vectors = layer.velora_vectors.clone()
    coef = layer._parameters["coef"]
    kept = None if coef is None else coef.detach().clone()
    assert layer.to(dtype) is layer
    assert layer.raw_weight.dtype == dtype
    assert_bitwise(layer.velora_vectors, vectors.to(wide))
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == wide, name
    if coef is not None:
        assert kept is not None
        assert layer.coef is coef, "an optimizer that holds it must not lose it"
        assert_bitwise(coef.detach(), kept.to(wide))
        assert coef.grad is not None
        assert coef.grad.dtype == wide
    folds = layer.velora.folds
    layer(batch(6).to(dtype)).sum().backward()
    assert layer.velora.folds == folds, "a cast is not a step"


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_training_goes_on_after_a_cast(cast: str):
    model = nn.Sequential(nn.Linear(10, 6))
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    getattr(model, cast)()
    before = model[0].weight.detach().clone()
    (model(batch(0).to(before.dtype)) - 1).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_cast_of_a_model_takes_pending_changes_along():
    layer = compress(nn.Linear(10, 6), fold_every=None)
    layer(batch(0))
    with torch.no_grad():
        layer.coef.fill_(1e-6)
    layer.bfloat16()
    assert layer.velora.pending
    assert_bitwise(layer.coef.detach(), torch.full((6, 4), 1e-6))


# ------------------------------------------------------------------ hooks


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_fire(gradient: str, when: str):
    """Registered before or after compress: forward pre, forward, full backward (pre)."""
    model = nn.Sequential(nn.Linear(10, 6).double())
    (plain,) = model
    calls: dict[str, Any] = {}

    def hooks(layer: nn.Module) -> None:
        layer.register_forward_pre_hook(lambda m, args: calls.__setitem__("pre", args[0]))
        layer.register_forward_hook(lambda m, args, y: calls.__setitem__("post", y))
        layer.register_full_backward_pre_hook(lambda m, dY: calls.__setitem__("dY", dY[0]))
        layer.register_full_backward_hook(lambda m, dX, dY: calls.__setitem__("dX", dX[0]))

    if when == "before":
        hooks(plain)
    velora_torch.compress(model, VeloraConfig(num_groups=4, gradient=gradient))
    if when == "after":
        hooks(model[0])
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.backward(torch.ones_like(y))
    assert set(calls) == {"pre", "post", "dY", "dX"}
    assert_bitwise(calls["post"].detach(), y.detach())
    assert_bitwise(calls["dX"], x.grad)


def test_a_hook_can_replace_the_output():
    layer = compress(nn.Linear(10, 6))
    layer.register_forward_hook(lambda m, args, y: y * 2)
    plain = nn.functional.linear(batch(0), layer.raw_weight, layer.bias)
    assert_bitwise(layer(batch(0)), plain * 2)


def test_text_names_the_compression():
    assert repr(compress(nn.Linear(10, 6))) == (
        "CompressedLinear(in_features=10, out_features=6, bias=True, velora: 4 groups of 3)"
    )
    assert isinstance(compress(nn.Linear(10, 6)), nn.Linear)
