"""When vectors are chosen: by training forwards only, and once for each optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.subtoken.factored import expand

from ..closeness import assert_bitwise, assert_close
from ..subtoken.test_vectors import assert_unit, average, cut
from .cases import GRADIENTS, compress, linear

FROM_DATA = ["average", "running_average", "batch_average", "svd"]
RANDOM = ["random", "rademacher"]
INITS = [*FROM_DATA, *RANDOM]
VECTORS = ["shared", "per_group"]


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 10, generator=generator, dtype=torch.float64) + 0.3


def layer_of(**settings: Any) -> CompressedLayer:
    torch.manual_seed(1)
    return compress(linear(10, 5).double(), **settings)


def train(layer: nn.Module, batches: list[Tensor], optimizer: Any = None) -> list[Tensor]:
    """One step for each batch; the vectors after each."""
    optimizer = optimizer or torch.optim.SGD(layer.parameters(), 0.01)
    seen = []
    for x in batches:
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        seen.append(layer.velora_vectors.clone())
    return seen


def mean(x: Tensor, vectors: str) -> Tensor:
    return average(x, 4, 3, per_group=vectors == "per_group")


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("gradient", GRADIENTS)
class TestEachInit:
    def test_average_is_of_the_first_batch(self, vectors: str, gradient: str):
        layer = layer_of(vectors=vectors, gradient=gradient)
        for v in train(layer, [batch(0), batch(1), batch(2)]):
            assert_close(v, cut(mean(batch(0), vectors), 10), 1e-12)
        assert layer.velora.draws == 1

    def test_running_average(self, vectors: str, gradient: str):
        layer = layer_of(init="running_average", vectors=vectors, gradient=gradient)
        running = torch.zeros(0)
        for step, v in enumerate(train(layer, [batch(0), batch(1), batch(2)])):
            new = mean(batch(step), vectors)
            running = new if step == 0 else 0.9 * running + 0.1 * new
            assert_close(v, cut(running, 10), 1e-12)

    def test_batch_average(self, vectors: str, gradient: str):
        layer = layer_of(init="batch_average", vectors=vectors, gradient=gradient)
        for step, v in enumerate(train(layer, [batch(0), batch(1), batch(2)])):
            assert_close(v, cut(mean(batch(step), vectors), 10), 1e-12)

    def test_svd(self, vectors: str, gradient: str):
        layer = layer_of(init="svd", vectors=vectors, gradient=gradient, num_groups=5)
        train(layer, [batch(0), batch(1)])
        tokens = batch(0).unflatten(1, (5, 2))
        for g in range(5):
            rows = tokens[:, g] if vectors == "per_group" else tokens.reshape(-1, 2)
            first = torch.linalg.svd(rows).Vh[0]
            along = torch.dot(first, layer.velora_vectors[g]).abs().item()
            assert along == pytest.approx(1, rel=1e-10)

    @pytest.mark.parametrize("init", RANDOM)
    def test_random_needs_no_data(self, vectors: str, gradient: str, init: str):
        layer = layer_of(init=init, vectors=vectors, gradient=gradient)
        before = layer.velora_vectors.clone()
        for v in train(layer, [batch(0), batch(1)]):
            assert_bitwise(v, before)
        assert (layer.velora.draws, layer.velora.drawn) == (1, True)

    @pytest.mark.parametrize("init", ["average", "svd", *RANDOM])
    def test_refresh_every(self, vectors: str, gradient: str, init: str):
        layer = layer_of(init=init, vectors=vectors, gradient=gradient, refresh_every=2)
        first, second, third, fourth, fifth = train(layer, [batch(i) for i in range(5)])
        if init in RANDOM:  # drawn right after the step: it needs no batch
            assert [torch.equal(first, v) for v in (second, third)] == [False, False]
            assert torch.equal(second, third)
            assert torch.equal(fourth, fifth)
        else:
            assert torch.equal(first, second)
            assert not torch.equal(second, third)
            assert torch.equal(third, fourth)
        assert layer.velora.draws == 3

    @pytest.mark.parametrize("init", INITS)
    @pytest.mark.parametrize("groups", [5, 4, 6], ids=["divisible", "cut", "all-padding"])
    def test_rows_are_unit_vectors(self, vectors: str, gradient: str, init: str, groups: int):
        layer = layer_of(init=init, vectors=vectors, gradient=gradient, num_groups=groups)
        assert_unit(layer.velora_vectors, 10)
        for v in train(layer, [batch(0), batch(1)]):
            assert_unit(v, 10)


@pytest.mark.parametrize(
    "settings",
    [{"init": "batch_average"}, {"init": "average", "refresh_every": 1}],
    ids=["batch_average", "refresh"],
)
def test_coefficients_are_folded_where_new_vectors_are_due(settings: dict[str, Any]):
    """At the step, so that no forward pass changes the weight."""
    layer = layer_of(fold_every=3, **settings)
    train(layer, [batch(0)])
    assert (layer.velora.due, layer.velora.pending, layer.velora.folds) == (True, False, 1)


@pytest.mark.parametrize("init", RANDOM)
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_scaled_by_m_random_vectors_are_right_on_average(init: str, vectors: str, gradient: str):
    """E[v v^T] = I/M. Of n draws the mean is off by sqrt((M - 1) / n) of the exact gradient."""
    torch.manual_seed(1)
    groups, size, draws = 3, 4, 300
    plain = linear(groups * size, 64).double()
    settings = {"init": init, "vectors": vectors, "gradient": gradient, "refresh_every": 1}
    layer = compress(plain, num_groups=groups, scale=float(size), **settings)
    x = torch.randn(6, groups * size, dtype=torch.float64)
    plain(x).square().sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    total = torch.zeros_like(plain.weight)
    for _ in range(draws):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        if gradient == "dense":
            total += layer.weight.grad
        else:
            total += expand(layer.coef.grad, layer.velora_vectors, groups * size)
        optimizer.step()
    error = (total / draws - plain.weight.grad).norm() / plain.weight.grad.norm()
    assert 0.5 < error / ((size - 1) / draws) ** 0.5 < 1.5


@pytest.mark.parametrize("vectors", VECTORS)
def test_rademacher_vectors_are_their_own_signs(vectors: str):
    layer = layer_of(init="rademacher", vectors=vectors, num_groups=4)
    v, exists = layer.velora_vectors, torch.ones(10, dtype=torch.bool).view(1, 10)
    exists = nn.functional.pad(exists, (0, 2)).view(4, 3)
    size = exists.sum(1, keepdim=True)
    assert_close(v, v.sign() / size.double().sqrt(), 1e-12)
    assert torch.equal(v != 0, exists)
    assert (v[0] != v[1]).any() == (vectors == "per_group")
    many = layer_of(init="rademacher", vectors="per_group", num_groups=10).velora_vectors
    assert 0 < (many > 0).sum() < 10


@pytest.mark.parametrize("init", RANDOM)
@pytest.mark.parametrize("vectors", VECTORS)
def test_random_depends_on_name_and_seed_not_on_order(vectors: str, init: str):
    def model(seed: int, targets: Any = ("a", "b")) -> nn.Module:
        layers = nn.ModuleDict({name: nn.Linear(10, 5) for name in ("a", "b")})
        config = VeloraConfig(targets=targets, num_groups=2, init=init, vectors=vectors, seed=seed)
        return velora_torch.compress(layers, config)

    one, again, alone, other = model(0), model(0), model(0, ["b"]), model(1)
    for name in ("a", "b"):
        assert_bitwise(one[name].velora_vectors, again[name].velora_vectors)
        assert not torch.equal(one[name].velora_vectors, other[name].velora_vectors)
    assert_bitwise(one["b"].velora_vectors, alone["b"].velora_vectors)
    assert not torch.equal(one["a"].velora_vectors, one["b"].velora_vectors)


# ------------------------------------------------------------------ bad first batches


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("init", FROM_DATA)
@pytest.mark.parametrize("gradient", ["factored", "dense"])
def test_first_batch_without_direction(gradient: str, init: str, vectors: str, value: float):
    model = nn.Sequential(linear(10, 5).double()).train()
    velora_torch.compress(
        model, VeloraConfig(num_groups=4, init=init, vectors=vectors, gradient=gradient)
    )
    layer: Any = model[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(torch.full((6, 10), value, dtype=torch.float64))
    assert_unit(layer.velora_vectors, 10)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match=r"first batch gave no direction for '0'"):
        optimizer.step()
    assert_unit(layer.velora_vectors, 10)

    train(layer, [batch(1)], optimizer)
    assert_unit(layer.velora_vectors, 10)
    if init != "svd":
        assert_close(layer.velora_vectors, cut(mean(batch(1), vectors), 10), 1e-12)
    fixed = layer.velora_vectors.clone()
    train(layer, [batch(2)], optimizer)
    assert torch.equal(layer.velora_vectors, fixed) == (init in ("average", "svd"))


@pytest.mark.parametrize("init", ["running_average", "batch_average"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_later_batch_without_direction(init: str, value: float):
    layer = layer_of(init=init)
    (before,) = train(layer, [batch(0)])
    layer(torch.full((6, 10), value, dtype=torch.float64))
    assert_close(layer.velora_vectors, before, 1e-12)
    assert torch.isfinite(layer.velora_vectors).all()


def test_a_dead_group_is_no_reason_to_draw_each_step():
    x = batch(0)
    x[:, 3:6] = 0
    layer = layer_of(vectors="per_group")
    first, second = train(layer, [x, x])
    assert torch.equal(first, second)
    assert layer.velora.draws == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("init", FROM_DATA)
def test_tiny_and_huge_inputs(init: str, scale: float):
    plain = linear(10, 5)
    normal, extreme = (compress(plain, init=init, vectors="per_group") for _ in range(2))
    normal(batch(0).float())
    extreme(batch(0).float() * scale)
    assert_close(extreme.velora_vectors, normal.velora_vectors, 1e-4)


# ------------------------------------------------------------------ no data-dependent branch


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("init", INITS)
def test_fake_tensors(init: str, vectors: str, gradient: str):
    """Nothing looks at a number, so that no GPU waits and no trace breaks."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(10, 12), nn.ReLU(inplace=True), nn.Linear(12, 3))
        config = VeloraConfig(num_groups=4, init=init, vectors=vectors, gradient=gradient)
        velora_torch.compress(model, config)
        for _ in range(2):
            model(torch.randn(2, 5, 10)).sum().backward()
        layer: Any = model[0]
        trained = layer.coef if gradient == "factored" else layer.raw_weight
        assert trained.grad.shape == trained.shape
        layer.draw(torch.randn(5, 10))


def test_meta_device():
    layer = compress(nn.Linear(10, 5, device="meta"))
    layer(torch.randn(6, 10, device="meta")).sum().backward()
    assert layer.coef.grad is not None
    assert layer.coef.grad.shape == (5, 4)


# ------------------------------------------------------------------ who may choose


def forward_eval(layer: CompressedLayer) -> None:
    layer.eval()(batch(9))
    layer.train()


def forward_no_grad(layer: CompressedLayer) -> None:
    with torch.no_grad():
        layer(batch(9))


def forward_inference(layer: CompressedLayer) -> None:
    with torch.inference_mode():
        layer(batch(9))


def forward_frozen(layer: CompressedLayer) -> None:
    layer.requires_grad_(False)
    layer(batch(9))
    layer.requires_grad_(True)
    layer.raw_weight.requires_grad_(layer.velora.config.gradient == "dense")


OTHERS = [forward_eval, forward_no_grad, forward_inference, forward_frozen]


@pytest.mark.parametrize("forward", OTHERS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("init", INITS)
def test_only_training_forwards_choose(init: str, gradient: str, forward: Any):
    """Before the first step, and where a redraw is due."""
    layer = layer_of(init=init, refresh_every=1, gradient=gradient)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for step in range(2):
        vectors, counters = layer.velora_vectors.clone(), layer.velora.counters()
        running = layer.velora_running
        forward(layer)
        assert_bitwise(layer.velora_vectors, vectors)
        assert layer.velora.counters() == counters
        assert layer.velora_running is running
        train(layer, [batch(step)], optimizer)


@pytest.mark.parametrize("init", ["average", "running_average"])
def test_generation_does_not_choose(init: str):
    from ..tiny_models import llama, token_batch

    pytest.importorskip("transformers")
    model = llama(layers=1).train()
    velora_torch.compress(model, VeloraConfig(num_groups=4, init=init))
    model.generate(**token_batch(), max_new_tokens=2, do_sample=False)
    layers = [m for m in model.modules() if isinstance(m, CompressedLayer)]
    assert layers
    assert not any(layer.velora.drawn for layer in layers)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_backward_in_evaluation_before_training_warns(gradient: str):
    layer = layer_of(gradient=gradient)
    x = batch(0).requires_grad_()
    y = layer.eval()(x)
    with pytest.warns(UserWarning, match=r"layer '0' is in evaluation mode and has no vectors"):
        y.sum().backward()
    trained = layer.raw_weight if gradient == "dense" else layer.coef
    assert trained.grad is None
    assert_close(x.grad, torch.ones(6, 5, dtype=torch.float64) @ layer.raw_weight, 1e-12)
    assert_close(layer.bias.grad, torch.full((5,), 6.0), 1e-12)


def test_backward_in_evaluation_after_training_uses_the_old_vectors():
    layer = layer_of(init="batch_average")
    train(layer, [batch(0)])
    v = layer.velora_vectors.clone()
    layer.eval()(batch(1)).sum().backward()
    assert layer.coef.grad is not None
    assert_bitwise(layer.velora_vectors, v)


# ------------------------------------------------------------------ gradient checkpointing


class Blocks(nn.Module):
    """Two compressed layers inside one checkpointed block."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 10))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@contextmanager
def no_second_draw(model: nn.Module, expected: int) -> Iterator[None]:
    yield
    for module in model.modules():
        if isinstance(module, CompressedLayer):
            assert module.velora.draws == expected


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("fold_every", [1, 2])
@pytest.mark.parametrize("init", INITS)
def test_gradient_checkpointing(init: str, gradient: str, reentrant: bool, fold_every: int):
    def run(reentrant: bool | None) -> list[Tensor]:
        torch.manual_seed(3)
        model = Blocks(reentrant).double()
        config = VeloraConfig(num_groups=4, init=init, gradient=gradient, fold_every=fold_every)
        velora_torch.compress(model, config)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        seen = []
        for step in range(3):
            draws = 1 if init in ("average", "svd", *RANDOM) else step + 1
            optimizer.zero_grad()
            with no_second_draw(model, draws):
                model(batch(step).requires_grad_()).square().mean().backward()
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            seen += [b.clone() for n, b in model.named_buffers() if n.endswith("velora_vectors")]
            optimizer.step()
        return seen

    for checkpointed, plain in zip(run(reentrant), run(None), strict=True):
        assert_close(checkpointed, plain, 1e-12)


# ------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("init", INITS)
def test_accumulation_never_redraws_in_the_middle(init: str, gradient: str):
    layer = layer_of(init=init, refresh_every=1, gradient=gradient)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for step in range(3):
        optimizer.zero_grad()
        first = None
        for micro in range(3):
            layer(batch(10 * step + micro)).square().mean().backward()
            first = layer.velora_vectors.clone() if first is None else first
            assert_bitwise(layer.velora_vectors, first)
        optimizer.step()
    # Random vectors are redrawn right after each step, others by the next forward.
    assert layer.velora.draws == (4 if init in RANDOM else 3)


def test_accumulated_gradient_is_the_sum():
    layer = layer_of(init="batch_average")
    layer(batch(0)).square().sum().backward()
    layer(batch(1)).square().sum().backward()
    assert layer.coef.grad is not None
    both = layer.coef.grad.clone()
    layer.coef.grad = None
    layer(torch.cat([batch(0), batch(1)])).square().sum().backward()
    assert_close(both, layer.coef.grad, 1e-12)


def test_a_warning_is_given_once():
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    x = torch.zeros(6, 10, dtype=torch.float64)
    layer(x).square().mean().backward()
    with pytest.warns(UserWarning, match="no direction"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(layer, [batch(0), batch(1)], optimizer)
