"""Coefficients on a quantised layer: what is computed, and what is kept."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.layers.quantized import dequantise
from velora_torch.subtoken import reference

from ..closeness import TOLERANCE, assert_bitwise, assert_close
from .cases import BASES, BITSANDBYTES, DTYPE, GROUPS, QUANTISED, compress, config, layer, saved

T, D, O = 10, 64, 32  # noqa: E741
NEAR = TOLERANCE[DTYPE]


def inputs() -> Tensor:
    return (torch.randn(2, T // 2, D) + 0.5).to(DTYPE).requires_grad_()


def weight_OD(module: nn.Module) -> Tensor:
    """The base weight in float64."""
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        return module.weight.detach().double()
    return dequantise(module, torch.float32).double()


def give_coefficients(compressed: CompressedLayer, direction: str) -> Tensor:
    """Random pending coefficients; returns what they add to the weight, in float64."""
    compressed.velora.direction = direction
    with torch.no_grad():
        compressed.coef.normal_(0, 0.1)
    v = compressed.velora_vectors.double()
    e = v.sign() if direction == "sign" else v
    return reference.expand(compressed.coef.detach().double(), e, D)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("base", BASES)
def test_while_coefficients_are_zero_it_is_the_plain_layer(base: str, bias: bool):
    plain = layer(base, bias=bias)
    compressed = compress(plain)
    x = inputs()
    x_plain = x.detach().clone().requires_grad_()
    y, y_plain = compressed(x), plain(x_plain)
    assert_bitwise(y, y_plain)
    dY = torch.randn_like(y)
    y.backward(dY)
    y_plain.backward(dY)
    if base.startswith("torchao"):  # theirs scales after the product, ours before it
        assert_close(x.grad, x_plain.grad, NEAR)
    else:
        assert_bitwise(x.grad, x_plain.grad)
    z = reference.compress(x.detach().double().reshape(-1, D), compressed.velora_vectors.double())
    assert compressed.coef.grad is not None
    assert compressed.coef.grad.dtype == torch.float32
    assert_close(compressed.coef.grad, dY.double().reshape(-1, O).T @ z, NEAR)
    assert not any(p.requires_grad for n, p in compressed.named_parameters() if n != "coef")


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("groups", [GROUPS, 7], ids=["divisible", "cut"])
@pytest.mark.parametrize("direction", ["v", "sign"])
@pytest.mark.parametrize("base", BASES)
def test_pending_coefficients(base: str, direction: str, groups: int, scale: float):
    compressed = compress(layer(base), num_groups=groups, scale=scale)
    compressed(inputs())
    weight = weight_OD(compressed) if base != "frozen-bf16" else compressed.weight_OD.double()
    merged = weight + give_coefficients(compressed, direction)
    x = inputs()
    flat = x.detach().double().reshape(-1, D)
    y = compressed(x)
    bias = compressed.bias.double()
    assert_close(y.reshape(-1, O), flat @ merged.T + bias, NEAR)
    with torch.no_grad():
        assert_close(compressed(x), y, NEAR)
    dY = torch.randn_like(y)
    y.backward(dY)
    flat_dY = dY.double().reshape(-1, O)
    z = reference.compress(flat, compressed.velora_vectors.double())  # v, whatever e is
    assert_close(x.grad, (flat_dY @ merged).view(x.shape), NEAR)
    assert_close(compressed.coef.grad, scale * flat_dY.T @ z, NEAR)
    assert_close(compressed.merged_weight(), merged, NEAR if base == "frozen-bf16" else 1e-6)


@pytest.mark.parametrize("base", BASES)
def test_trained_bias(base: str):
    plain = layer(base)
    plain.bias.requires_grad_(True)
    compressed = compress(plain)
    y = compressed(inputs())
    dY = torch.randn_like(y)
    y.backward(dY)
    assert_close(compressed.bias.grad, dY.reshape(-1, O).double().sum(0), NEAR)


@pytest.mark.parametrize("pending", ["zero", "v", "sign"])
@pytest.mark.parametrize("base", BASES)
def test_it_keeps_z_alone(base: str, pending: str):
    compressed = compress(layer(base))
    compressed(inputs())
    if pending != "zero":
        give_coefficients(compressed, pending)
    kept = saved(compressed, inputs())
    signs = [(GROUPS, D // GROUPS)] if pending == "sign" else []
    assert sorted(tuple(t.shape) for t in kept) == sorted([*signs, (T, GROUPS)])
    (z,) = (t for t in kept if tuple(t.shape) == (T, GROUPS))
    assert z.untyped_storage().nbytes() == T * GROUPS * 2


@pytest.mark.parametrize("base", BASES)
def test_nobody_holds_the_input(base: str):
    """Neither as a saved tensor, nor in any other way."""
    compressed = compress(layer(base))
    x = inputs() * 1
    alive = weakref.ref(x)
    y = compressed(x)
    del x
    assert alive() is None
    y.sum().backward()


@pytest.mark.parametrize(
    ("base", "holds"),
    [("nf4", False), ("nf4-double", False), ("fp4", False), ("int8", True)],
)
def test_which_plain_layers_hold_their_input(base: str, holds: bool):
    """The yardstick: bitsandbytes' 8-bit layer keeps it where no hook for saved tensors looks."""
    plain = layer(base)
    x = inputs() * 1
    alive = weakref.ref(x)
    y = plain(x)
    del x
    assert (alive() is not None) == holds
    y.sum().backward()


@pytest.mark.parametrize("base", ["torchao-int8", "torchao-int4"])
def test_plain_torchao_layers_keep_an_unpacked_weight(base: str):
    kept = saved(layer(base), inputs())
    assert (D, O) in [tuple(t.shape) for t in kept if t.dtype == DTYPE]


@pytest.mark.parametrize("base", BITSANDBYTES)
def test_training_after_evaluation(base: str):
    """bitsandbytes repacks 4-bit weights in evaluation on some CPUs, for good."""
    plain = layer(base)
    untouched = copy.deepcopy(plain)
    for packed_before in (False, True):
        plain = copy.deepcopy(untouched)
        if packed_before:
            with torch.no_grad():
                plain.eval()(inputs().detach())
        compressed = compress(plain)
        with torch.no_grad():
            compressed.eval()(inputs().detach())
        compressed.train()
        x = inputs()
        y = compressed(x)
        dY = torch.randn_like(y)
        y.backward(dY)
        tolerance = NEAR if base == "nf4-double" else 1e-2
        assert_close(x.grad, dY.double() @ dequantise(untouched, torch.float32).double(), tolerance)


@pytest.mark.parametrize("base", BASES)
def test_evaluation_and_no_training(base: str):
    compressed = compress(layer(base))
    compressed(inputs())
    give_coefficients(compressed, "v")
    with torch.no_grad():
        assert saved(compressed, inputs()) == []
    x = inputs()
    compressed(x).sum().backward()
    expected = x.grad
    compressed.coef.requires_grad_(False)
    x.grad = None
    assert all(t.numel() != T * D for t in saved(compressed, x))
    compressed(x).sum().backward()
    assert_close(x.grad, expected, NEAR)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("base", BASES)
def test_copies_and_pickles(base: str, how: Callable[[Any], Any]):
    if how is not copy.deepcopy and base.startswith("torchao"):
        pytest.skip("torchao's own layers cannot be pickled")
    compressed = compress(layer(base))
    compressed(inputs())
    give_coefficients(compressed, "sign")
    x = inputs().detach()
    again = how(compressed)
    assert type(again) is type(compressed)
    assert_bitwise(again(x), compressed(x))
    again(inputs()).sum().backward()
    assert again.coef.grad is not None
    assert compressed.coef.grad is None


@pytest.mark.parametrize("base", BASES)
def test_weight_decay_leaves_the_base_alone(base: str):
    compressed = compress(layer(base))
    before = weight_OD(compressed) if base in QUANTISED else compressed.weight_OD.clone()
    optimizer = torch.optim.AdamW([compressed.coef], 0.01, weight_decay=0.5)
    for _ in range(2):
        compressed(inputs()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = weight_OD(compressed) if base in QUANTISED else compressed.weight_OD
    assert_bitwise(after, before)
    assert compressed.velora.lost is None


@pytest.mark.parametrize("base", BASES)
def test_restore_gives_the_frozen_layer_back(base: str):
    plain = layer(base)
    model = nn.Sequential(copy.deepcopy(plain)).train()
    velora_torch.compress(model, config())
    model(inputs())
    velora_torch.restore(model)
    assert type(model[0]) is type(plain)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == nn.Sequential(plain).state_dict().keys()
    x = inputs()
    assert_bitwise(model(x), plain(x))


def test_double_backward_is_refused():
    compressed = compress(layer("nf4"))
    x = inputs()
    (gradient,) = torch.autograd.grad(compressed(x).sum(), compressed.coef, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("direction", ["sign", "v"])
@pytest.mark.parametrize("base", ["nf4", "int8", "torchao-int8"])
def test_gradient_checkpointing(base: str, direction: str):
    from torch.utils.checkpoint import checkpoint

    compressed = compress(layer(base))
    compressed(inputs())
    give_coefficients(compressed, direction)
    x = inputs()
    compressed(x).sum().backward()
    expected, dX = compressed.coef.grad, x.grad
    compressed.coef.grad = x.grad = None
    checkpoint(compressed, x, use_reentrant=False).sum().backward()
    assert_bitwise(compressed.coef.grad, expected)
    assert_bitwise(x.grad, dX)


def test_a_batch_without_a_direction_keeps_its_vectors():
    """New vectors may be drawn after a fold only, and nothing can be folded here."""
    compressed = compress(layer("nf4"))
    x = torch.cat([torch.ones(1, D), -torch.ones(1, D)]).to(DTYPE)
    optimizer = torch.optim.SGD([compressed.coef], 0.1)
    (compressed(x) * torch.tensor([[1.0], [0.5]])).float().square().sum().backward()
    with pytest.warns(UserWarning, match="gave no direction"):
        optimizer.step()
    assert compressed.velora.pending
    vectors = compressed.velora_vectors.clone()
    compressed(inputs())
    assert_bitwise(compressed.velora_vectors, vectors)
    assert compressed.velora.pending


@pytest.mark.parametrize("base", QUANTISED)
def test_by_default_a_quantised_layer_stays_as_it_is(base: str):
    model = nn.Sequential(layer(base), nn.Linear(O, 8).to(DTYPE))
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    assert velora_torch.summary(model).exact == {"0": "frozen: keeps no input"}
