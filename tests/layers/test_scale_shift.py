"""`ScaleShift` as a layer that `compress` knows."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.checkpoint import load_state, save_state
from velora_torch.config import Init
from velora_torch.layers import CompressedLayer
from velora_torch.layers.scale_shift import ScaleShift
from velora_torch.subtoken import reference

from ..closeness import TOLERANCE, assert_bitwise, assert_close
from .test_saved_bytes import saved, shapes, storage_numbers

T, D, G = 20, 24, 4
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
INITS = get_args(Init)


class Frozen(nn.Module):
    """A frozen layer with a scale and shift behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D).requires_grad_(False)
        self.ssf = ScaleShift(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.ssf(self.base(x))


def compress(layer: ScaleShift, **settings: Any) -> CompressedLayer:
    """A compressed copy."""
    model = nn.Sequential(copy.deepcopy(layer)).train()
    velora_torch.compress(model, VeloraConfig(**{"num_groups": G} | settings))
    (compressed,) = model
    assert isinstance(compressed, CompressedLayer)
    return compressed


def expected(layer: CompressedLayer, x: Tensor, dY: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.scale_shift_gradients(
        x.detach().double(),
        layer.raw_weight.detach().to(x.dtype).double(),
        dY.double(),
        layer.velora_vectors.double(),
        layer.velora.config.scale,
    )


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("vectors", ["shared", "per_group"])
@pytest.mark.parametrize("groups", [4, 5], ids=["divisible", "cut"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(dtype: torch.dtype, groups: int, vectors: str, scale: float):
    plain = ScaleShift(D, dtype=torch.promote_types(dtype, torch.float32))
    layer = compress(plain, num_groups=groups, vectors=vectors, scale=scale)
    x = torch.randn(2, 5, D).to(dtype).requires_grad_()
    y = layer(x)
    assert_bitwise(y, plain(x))
    dY = torch.randn_like(y)
    y.backward(dY)
    dX, dgamma, dbeta = expected(layer, x, dY)
    assert_close(x.grad, dX, TOLERANCE[dtype])
    assert_close(layer.raw_weight.grad, dgamma, TOLERANCE[dtype])
    assert_close(layer.bias.grad, dbeta, TOLERANCE[dtype])  # type: ignore[union-attr]


@pytest.mark.parametrize("init", INITS)
def test_choices_of_v(init: str):
    layer = compress(ScaleShift(D, shift=False).double(), init=init)
    x = torch.randn(T, D, dtype=torch.float64)
    y = layer(x)
    dY = torch.randn_like(y)
    y.backward(dY)
    assert_close(layer.raw_weight.grad, expected(layer, x, dY)[1], 1e-10)


def test_images_with_channels_first():
    layer = compress(ScaleShift(D, dim=-3).double())
    x = torch.randn(2, D, 3, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dY = torch.randn_like(y)
    y.backward(dY)
    _, dgamma, dbeta = expected(layer, x.movedim(1, -1), dY.movedim(1, -1))
    assert_close(layer.raw_weight.grad, dgamma, 1e-10)
    assert_close(layer.bias.grad, dbeta, 1e-10)  # type: ignore[union-attr]
    assert shapes(saved(layer, x)) == [(2 * 3 * 5, G)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved(dtype: torch.dtype):
    """z alone; the plain layer keeps x (and its rounded parameters)."""
    plain = ScaleShift(D, dtype=dtype)
    x = torch.randn(4, T // 4, D).to(dtype)
    assert [storage_numbers(t) for t in saved(plain, x)] == [T * D]
    (z,) = saved(compress(plain), x)
    assert z.dtype == dtype
    assert storage_numbers(z) == T * G


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ("ssf",), r".*\.?ssf", lambda name, module: name == "ssf"],
    ids=["all-linear", "name", "regular-expression", "function"],
)
def test_selection(targets: Any):
    model = velora_torch.compress(Frozen(), VeloraConfig(targets=targets, num_groups=G))
    table = velora_torch.summary(model)
    (layer,) = table.compressed.values()
    assert list(table.compressed) == ["ssf"]
    assert (layer.features, layer.outputs, layer.groups) == (D, D, G)
    assert (layer.weights, layer.trainable, layer.gradient) == (D, D, "dense")
    assert not layer.pending
    assert table.exact == {"base": "frozen: keeps no input"}
    assert "1 x ssf" in str(table)


def test_too_many_groups_stay_exact():
    model = nn.Sequential(nn.Linear(64, 64), ScaleShift(8))
    velora_torch.compress(model, VeloraConfig(num_groups=32))
    assert "num_groups=32 is larger" in velora_torch.summary(model).exact["1"]


def test_a_frozen_scale_stays_exact():
    model = Frozen()
    model.ssf.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen: keeps no input"):
        velora_torch.compress(model, VeloraConfig(targets=["ssf"], num_groups=G))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_an_optimizer_trains_it(make: type[torch.optim.Optimizer]):
    layer = compress(ScaleShift(D), refresh_every=2, init="random")
    optimizer = make(layer.parameters(), lr=0.01)  # type: ignore[call-arg]
    x = torch.randn(T, D)
    losses = []
    for _ in range(4):
        loss = (layer(x) - 2 * x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert layer.velora.steps == 4
    assert layer.velora.draws == 3  # at first, and after steps 2 and 4


def test_restored_it_is_plain():
    model = Frozen()
    keys = set(model.state_dict())
    velora_torch.compress(model, VeloraConfig(targets=["ssf"], num_groups=G))
    assert set(model.state_dict()) == keys
    model(torch.randn(T, D)).sum().backward()
    velora_torch.restore(model)
    assert type(model.ssf) is ScaleShift
    assert model.ssf.weight.requires_grad
    assert set(vars(model.ssf)) == set(vars(ScaleShift(D)))
    assert not list(model.ssf.buffers())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str):
    model = velora_torch.compress(Frozen(), VeloraConfig(targets=["ssf"], num_groups=G))
    x = torch.randn(T, D)
    model(x).sum().backward()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    model.zero_grad()
    twin.zero_grad()
    for each in (model, twin):
        each(x).square().sum().backward()
    assert_bitwise(twin.ssf.raw_weight.grad, model.ssf.raw_weight.grad)  # type: ignore[union-attr, arg-type]


def test_its_state_is_saved_and_loaded(tmp_path: Path):
    config = VeloraConfig(targets=["ssf"], num_groups=G)
    model = velora_torch.compress(Frozen(), config)
    model(torch.randn(T, D)).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    save_state(model, tmp_path)
    other = Frozen()
    other.load_state_dict(model.state_dict())
    velora_torch.compress(other, config)
    load_state(other, tmp_path)
    ours, theirs = model.ssf, other.ssf
    assert isinstance(ours, CompressedLayer)
    assert isinstance(theirs, CompressedLayer)
    assert_bitwise(theirs.velora_vectors, ours.velora_vectors)
    assert theirs.velora.counters() == ours.velora.counters()
    x = torch.randn(T, D)
    for each in (model, other):
        each.zero_grad()
        each(x).square().sum().backward()
    assert_bitwise(theirs.raw_weight.grad, ours.raw_weight.grad)  # type: ignore[arg-type]


def test_moved_to_16_bits_it_keeps_its_vectors():
    layer = compress(ScaleShift(D))
    layer(torch.randn(T, D))
    before = layer.velora_vectors.clone()
    layer.to(torch.bfloat16)
    assert_bitwise(layer.velora_vectors, before)
    x = torch.randn(T, D).bfloat16()
    layer(x).sum().backward()
    assert layer.raw_weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_under_autocast():
    """z is kept in 16 bits, gradients are the wide ones but for rounding."""
    layer = compress(ScaleShift(D))
    x = torch.randn(T, D)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        (z,) = saved(layer, x)
        y = layer(x)
    assert z.dtype == torch.bfloat16
    assert y.dtype == torch.float32, "as the plain layer's, whose input is in float32"
    dY = torch.randn_like(y)
    y.backward(dY)
    assert_close(layer.raw_weight.grad, expected(layer, x, dY)[1], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("init", INITS)
def test_under_gradient_checkpointing(init: str):
    """Both passes use the same vectors, and draw once."""
    settings: Any = {"init": init, "num_groups": G, "targets": ["1"]}
    plain = nn.Sequential(nn.Linear(D, D).requires_grad_(False), ScaleShift(D)).double()
    model = velora_torch.compress(copy.deepcopy(plain), VeloraConfig(**settings))
    other = velora_torch.compress(copy.deepcopy(plain), VeloraConfig(**settings))
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    checkpoint(other, x, use_reentrant=False).square().sum().backward()  # type: ignore[union-attr]
    assert_close(other[1].raw_weight.grad, model[1].raw_weight.grad, 1e-14)  # type: ignore[union-attr, arg-type]
    assert other[1].velora.draws == 1  # type: ignore[union-attr]


def test_evaluation_before_training_says_that_nothing_trains():
    layer = compress(ScaleShift(D)).eval()
    y = layer(torch.randn(T, D, requires_grad=True))
    with pytest.warns(UserWarning, match="has no vectors yet"):
        y.sum().backward()
    assert layer.raw_weight.grad is None


def test_no_graph_keeps_nothing():
    layer = compress(ScaleShift(D))
    with torch.no_grad():
        assert layer(torch.randn(T, D)).grad_fn is None
    assert not layer.velora.drawn, "only a training forward draws"


def test_a_frozen_scale_still_passes_gradients_on():
    layer = compress(ScaleShift(D))
    layer.raw_weight.requires_grad_(False)
    x = torch.randn(T, D, requires_grad=True)
    assert saved(layer, x) == []
    layer(x).sum().backward()
    assert_close(x.grad, layer.raw_weight.expand(T, D), 1e-6)
    assert layer.bias.grad is not None  # type: ignore[union-attr]


def test_recompute_leaves_it_alone():
    model = velora_torch.compress(Frozen(), VeloraConfig(targets=["ssf"], num_groups=G))
    x = torch.randn(T, D)
    y = model(x)
    velora_torch.recompute(model)
    assert isinstance(model.ssf, CompressedLayer)
    assert model.ssf.velora.draws == 1
    assert_bitwise(model(x), y)


def test_functional_call_differentiates_the_scale():
    layer = compress(ScaleShift(D).double())
    x = torch.randn(T, D, dtype=torch.float64)
    layer(x)

    def loss(gamma: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": gamma}, (x,)).sum()

    grad = torch.func.grad(loss)(layer.raw_weight.detach())
    assert_close(grad, expected(layer, x, torch.ones_like(x))[1], 1e-10)


def test_lora_export_is_refused(tmp_path: Path):
    model = velora_torch.compress(Frozen(), VeloraConfig(targets=["ssf"], num_groups=G))
    with pytest.raises(ValueError, match="'ssf': it scales features"):
        velora_torch.export_lora(model, tmp_path)


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "plain"])
def test_an_input_of_another_width(compressed: bool):
    layer: nn.Module = ScaleShift(D)
    layer = compress(layer) if compressed else layer  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"of 24 features got an input of shape \(20, 23\)"):
        layer(torch.randn(T, D - 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_compiled_without_graph_breaks():
    model = compress(ScaleShift(D).double())
    eager = copy.deepcopy(model)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    torch.compiler.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.compiler.reset()
    compiled_dX, x.grad = x.grad, None
    eager(x).square().sum().backward()
    assert_close(compiled_dX, x.grad, 1e-12)
    assert_close(model.raw_weight.grad, eager.raw_weight.grad, 1e-12)
    assert_close(model.bias.grad, eager.bias.grad, 1e-12)  # type: ignore[union-attr]
    assert_bitwise(model.velora_vectors, eager.velora_vectors)
