"""Every kind of layer: outputs are the plain layer's bit for bit, gradients the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.config import Init
from velora_torch.layers import CompressedLayer

from ..closeness import TOLERANCE, assert_bitwise, assert_close
from ..tiny_models import llama, token_batch
from .cases import (
    GRADIENTS,
    KINDS,
    Make,
    compress,
    expected_gradients,
    linear,
    weight_gradient,
    weight_OD,
)

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
LR = 0.1


def check(
    plain: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64, **settings: Any
) -> CompressedLayer:
    """Output, dX, db, dW, and the weight after one step of SGD."""
    plain = plain.to(dtype)
    layer = compress(plain, **settings)
    weight = weight_OD(plain)
    tolerance = TOLERANCE[dtype]

    y, y_plain = layer(x), plain(x)
    assert_bitwise(y, y_plain)
    dY = torch.randn(y.shape).to(dtype)
    y.backward(dY)
    dX, dW, db = expected_gradients(layer, x, weight, dY)
    if x.requires_grad:
        assert_close(x.grad, dX, tolerance)
    if plain.bias is not None:
        assert_close(layer.bias.grad, db, tolerance)
    assert_close(weight_gradient(layer), dW, tolerance)

    torch.optim.SGD(layer.parameters(), LR).step()
    moved = weight_OD(layer) - weight
    resolution = weight.abs().max() * torch.finfo(dtype).eps
    error = (moved + LR * dW).abs().max()
    assert error <= LR * tolerance * dW.norm() + resolution
    if layer._parameters["coef"] is not None:
        assert not layer.coef.any(), "the coefficients were folded"
    return layer


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("vectors", ["shared", "per_group"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", KINDS)
def test_kinds_and_types(make: Make, dtype: torch.dtype, gradient: str, vectors: str, scale: float):
    x = torch.randn(2, 5, 12).to(dtype).requires_grad_()
    check(make(12, 6), x, dtype, gradient=gradient, vectors=vectors, scale=scale)


@pytest.mark.parametrize("init", get_args(Init))
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
def test_choices_of_v(make: Make, gradient: str, init: str):
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    check(make(12, 6), x, gradient=gradient, init=init)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    ("features", "groups"),
    [
        pytest.param(12, 5, id="last-group-cut"),
        pytest.param(10, 6, id="group-all-padding"),
        pytest.param(7, 7, id="G-is-D"),
        pytest.param(7, 1, id="one-group"),
        pytest.param(1, 1, id="one-feature"),
    ],
)
@pytest.mark.parametrize("vectors", ["shared", "per_group"])
@pytest.mark.parametrize("make", KINDS)
def test_sizes(make: Make, features: int, groups: int, gradient: str, bias: bool, vectors: str):
    x = torch.randn(5, features, dtype=torch.float64, requires_grad=True)
    check(make(features, 3, bias), x, num_groups=groups, gradient=gradient, vectors=vectors)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("features", "size"), [(12, 5), (12, 12), (12, 1)])
def test_sub_token_size(features: int, size: int, gradient: str):
    x = torch.randn(5, features, dtype=torch.float64, requires_grad=True)
    layer = check(linear(features, 3), x, num_groups=None, sub_token_size=size, gradient=gradient)
    assert layer.velora_vectors.shape == (-(-features // size), size)


def transposed() -> Tensor:
    return torch.randn(12, 5, dtype=torch.float64).t()


def heads() -> Tensor:
    return torch.randn(2, 3, 5, 12, dtype=torch.float64).transpose(1, 2)


def sliced_tokens() -> Tensor:
    return torch.randn(9, 4, 12, dtype=torch.float64)[::2, 1:]


def sliced_features() -> Tensor:
    return torch.randn(5, 24, dtype=torch.float64)[:, ::2]


def expanded() -> Tensor:
    return torch.randn(1, 4, 12, dtype=torch.float64).expand(3, 4, 12)


INPUTS = [
    pytest.param(lambda: torch.randn(12, dtype=torch.float64), id="1-D"),
    pytest.param(lambda: torch.randn(5, 12, dtype=torch.float64), id="2-D"),
    pytest.param(lambda: torch.randn(2, 3, 12, dtype=torch.float64), id="3-D"),
    pytest.param(lambda: torch.randn(2, 3, 4, 12, dtype=torch.float64), id="4-D"),
    pytest.param(transposed, id="transposed"),
    pytest.param(heads, id="heads"),
    pytest.param(sliced_tokens, id="sliced-tokens"),
    pytest.param(sliced_features, id="sliced-features"),
    pytest.param(expanded, id="expanded"),
]


@pytest.mark.parametrize("groups", [4, 5])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make_input", INPUTS)
def test_inputs(make_input: Callable[[], Tensor], gradient: str, groups: int):
    x = make_input().requires_grad_()
    check(linear(12, 6), x, num_groups=groups, gradient=gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape", [(2, 3, 12), (2, 3, 4, 12)], ids=["3-D", "4-D"])
def test_conv1d_inputs(shape: tuple[int, ...], gradient: str):
    check(
        KINDS[2].values[0](12, 6),
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
        gradient=gradient,
    )


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
def test_input_that_needs_no_gradient(make: Make, gradient: str):
    check(make(12, 6), torch.randn(5, 12, dtype=torch.float64), gradient=gradient)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("groups", [4, 5])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
def test_no_tokens(make: Make, gradient: str, groups: int, shape: tuple[int, ...]):
    """An empty batch gives zero gradients and leaves the choice of v to the next one."""
    layer = compress(make(12, 6), groups, gradient=gradient)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 6)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    trained = layer.raw_weight if gradient == "dense" else layer.coef
    assert trained.grad is not None
    assert not trained.grad.any()
    assert not layer.bias.grad.any()
    assert not layer.velora.drawn
    layer(torch.randn(3, 12)).sum().backward()
    assert layer.velora.drawn


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
def test_used_twice_in_one_forward(make: Make, gradient: str):
    plain = make(12, 12).double()
    layer = compress(plain, gradient=gradient)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    inner = layer(x)
    y = layer(torch.tanh(inner))
    assert_bitwise(y, plain(torch.tanh(plain(x))))
    dY = torch.randn_like(y)
    y.backward(dY)

    weight = weight_OD(plain)
    hidden = torch.tanh(plain(x)).detach()
    d_hidden, dW_2, db_2 = expected_gradients(layer, hidden, weight, dY)
    dX, dW_1, db_1 = expected_gradients(layer, x, weight, d_hidden * (1 - hidden**2))
    assert_close(x.grad, dX, 1e-10)
    assert_close(weight_gradient(layer), dW_1 + dW_2, 1e-10)
    assert_close(layer.bias.grad, db_1 + db_2, 1e-10)
    assert layer.velora.draws == 1


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("make", KINDS)
def test_inplace_operator_after_the_layer(make: Make, shape: tuple[int, ...], gradient: str):
    plain = make(12, 6).double()
    layer = compress(plain, gradient=gradient)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = F.relu_(layer(x))
    expected = torch.relu(plain(x.detach()))
    assert_bitwise(y, expected)
    dY = torch.randn_like(y)
    y.backward(dY)
    dX, dW, db = expected_gradients(layer, x, weight_OD(plain), dY * (expected > 0))
    assert_close(x.grad, dX, 1e-10)
    assert_close(weight_gradient(layer), dW, 1e-10)
    assert_close(layer.bias.grad, db, 1e-10)


def test_input_changed_in_place_after_the_layer():
    """The layer keeps z, not x: what happens to x later is no matter (a plain layer refuses)."""
    plain = linear(12, 6).double()
    layer = compress(plain)
    x = torch.randn(5, 12, dtype=torch.float64)
    before = x.clone()
    y = layer(x)
    x.zero_()
    dY = torch.randn_like(y)
    y.backward(dY)
    _, dW, _ = expected_gradients(layer, before, weight_OD(plain), dY)
    assert_close(weight_gradient(layer), dW, 1e-10)


# ------------------------------------------------------------------ PEFT


def lora_llama(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = llama(layers=1).to(dtype)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings
    )
    return peft.get_peft_model(model, config).to(dtype)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("vectors", ["shared", "per_group"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_peft_lora_a(gradient: str, vectors: str, scale: float):
    model = lora_llama().train()
    batch = token_batch()
    plain_logits = model(**batch).logits
    settings: Any = {"gradient": gradient, "vectors": vectors, "scale": scale}
    velora_torch.compress(model, VeloraConfig(targets=["lora_A"], num_groups=5, **settings))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedLayer)}
    assert {name.split(".")[-3] for name in layers} == {"q_proj", "down_proj"}

    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name} x"] = args[0].detach().clone()
            output.register_hook(lambda grad: seen.__setitem__(f"{name} dY", grad.clone()))

        return hook

    for name, layer in layers.items():
        layer.register_forward_hook(note(name))
    weights = {name: weight_OD(layer) for name, layer in layers.items()}
    logits = model(**batch).logits
    assert_bitwise(logits, plain_logits)
    logits.square().mean().backward()
    wanted = {
        name: expected_gradients(layer, seen[f"{name} x"], weights[name], seen[f"{name} dY"])[1]
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        assert_close(weight_gradient(layer), wanted[name], 1e-10)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR).step()
    for name, layer in layers.items():
        assert_close(weight_OD(layer) - weights[name], -LR * wanted[name], 1e-8)
