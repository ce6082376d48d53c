"""Second derivatives are refused, first ones are right however they are asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.layers import CompressedLayer

from ..closeness import assert_bitwise, assert_close
from .cases import GRADIENTS, KINDS, Make, compress, expected_gradients, weight_OD

REFUSED = "double backward through a compressed layer"


def setup(make: Make, **settings: Any) -> tuple[CompressedLayer, Tensor]:
    layer = compress(make(10, 6).double(), **settings)
    return layer, torch.randn(5, 10, dtype=torch.float64, requires_grad=True)


def trained(layer: CompressedLayer) -> Tensor:
    return layer.raw_weight if layer._parameters["coef"] is None else layer.coef


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
class TestDoubleBackward:
    def test_through_dx(self, make: Make, gradient: str):
        """A gradient penalty."""
        layer, x = setup(make, gradient=gradient)
        (dX,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            dX.square().sum().backward()

    def test_through_dx_to_x_alone(self, make: Make, gradient: str):
        layer, x = setup(make, gradient=gradient)
        (dX,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(dX.square().sum(), x)

    def test_through_the_weight_gradient(self, make: Make, gradient: str):
        """A Hessian-vector product."""
        layer, x = setup(make, gradient=gradient)
        (dC,) = torch.autograd.grad(layer(x).tanh().sum(), trained(layer), create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(dC.square().sum(), trained(layer))

    def test_through_the_bias_gradient(self, make: Make, gradient: str):
        layer, x = setup(make, gradient=gradient)
        (db,) = torch.autograd.grad(layer(x).tanh().sum(), layer.bias, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            db.square().sum().backward()

    def test_of_a_linear_loss(self, make: Make, gradient: str):
        layer, x = setup(make, gradient=gradient)
        (dX,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            dX.square().sum().backward()

    @pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
    def test_after_backward_with_create_graph(self, make: Make, gradient: str):
        layer, x = setup(make, gradient=gradient)
        layer(x).tanh().sum().backward(create_graph=True)
        gradient_of = trained(layer).grad
        assert gradient_of is not None
        with pytest.raises(RuntimeError, match=REFUSED):
            gradient_of.square().sum().backward()
        trained(layer).grad = x.grad = layer.bias.grad = None  # they form a cycle with the graph

    def test_create_graph_alone_gives_right_numbers(self, make: Make, gradient: str):
        layer, x = setup(make, gradient=gradient, scale=0.5)
        y = layer(x)
        dY = torch.randn_like(y)
        inputs = (x, trained(layer), layer.bias)
        first = torch.autograd.grad(y, inputs, dY, create_graph=True)
        plain = torch.autograd.grad(layer(x), inputs, dY)
        for a, b in zip(first, plain, strict=True):
            assert_bitwise(a.detach(), b)
        dX, _, db = expected_gradients(layer, x, weight_OD(layer), dY)
        assert_close(first[0], dX, 1e-10)
        assert_close(first[2], db, 1e-10)


def test_second_derivatives_elsewhere_in_the_model_work():
    """Layers after the compressed one, that do not need its gradient."""
    layer, x = setup(KINDS[0].values[0])
    head = nn.Linear(6, 1).double()
    (dw,) = torch.autograd.grad(head(layer(x)).tanh().sum(), head.weight, create_graph=True)
    (second,) = torch.autograd.grad(dw.square().sum(), head.weight)
    assert second.shape == head.weight.shape


# ------------------------------------------------------------------ torch.func


def model_and_input(**settings: Any) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    velora_torch.compress(model, VeloraConfig(num_groups=4, **settings))
    x = torch.randn(5, 10, dtype=torch.float64)
    model(x)
    return model, x


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_func_grad_of_functional_call(gradient: str):
    model, x = model_and_input(gradient=gradient)
    counters = [m.velora.counters() for m in model if isinstance(m, CompressedLayer)]

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(trainable(model))
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(got[name], parameter.grad, 1e-12)
    assert [m.velora.counters() for m in model if isinstance(m, CompressedLayer)] == counters


def test_functional_call_uses_the_coefficients_it_is_given():
    model, x = model_and_input()
    parameters = trainable(model)
    changed = {n: p + torch.randn_like(p) if "coef" in n else p for n, p in parameters.items()}
    weights = [m.raw_weight.clone() for m in model if isinstance(m, CompressedLayer)]
    given = {n: p.clone() for n, p in changed.items()}
    y = torch.func.functional_call(model, given, (x,))
    for name, parameter in given.items():
        assert_bitwise(parameter, changed[name])
    for layer, weight in zip((model[0], model[2]), weights, strict=True):
        assert_bitwise(layer.raw_weight, weight)
        assert not layer.coef.any()

    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in changed:
                parameter.copy_(changed[name])
    assert_close(y, other(x), 1e-12)


def test_func_grad_of_the_frozen_weight_is_refused():
    model, x = model_and_input()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    with pytest.raises(RuntimeError, match="weight of layer '0' is frozen"):
        torch.func.grad(loss)(parameters)


def test_functional_call_before_vectors_is_refused():
    model = nn.Sequential(nn.Linear(10, 4))
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    with pytest.raises(RuntimeError, match="before it has vectors"):
        torch.func.functional_call(model, trainable(model), (torch.randn(5, 10),))
    with pytest.raises(RuntimeError, match="before it has vectors"):
        torch.func.grad(lambda x: model(x).sum())(torch.randn(5, 10))


def test_func_grad_in_the_input():
    model, x = model_and_input(init="batch_average")
    got = torch.func.grad(lambda x: model(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    assert_close(got, leaf.grad, 1e-12)


def test_nested_func_grad_is_refused():
    model, x = model_and_input()
    parameters = trainable(model)

    def loss(coef: Tensor) -> Tensor:
        given = parameters | {"0.coef": coef}
        return torch.func.functional_call(model, given, (x,)).square().sum()

    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.grad(lambda c: torch.func.grad(loss)(c).square().sum())(parameters["0.coef"])


def test_vmap():
    """Gradients for each sample need a rule that this has not; without gradients it works."""
    model, x = model_and_input()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(model)(x)
    with torch.no_grad():
        assert_close(torch.func.vmap(model)(x), model(x), 1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_is_refused():
    layer, x = setup(KINDS[0].values[0])
    layer(x)
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(lambda x: layer(x), (x.detach(),), (torch.ones_like(x),))
