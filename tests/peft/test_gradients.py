"""Every method's gradients, layer by layer, against plain PEFT on the input that v rebuilds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velora_torch.layers import CompressedLayer
from velora_torch.layers.adapter import CompressedAdapter
from velora_torch.subtoken import reference

from ..closeness import TOLERANCE, assert_close
from ..tiny_models import run
from .cases import (
    IGNORED,
    METHODS,
    PAIRS,
    adapted,
    batch_of,
    compressed,
    inputs_of,
    layers_of,
)

pytestmark = [pytest.mark.filterwarnings(text) for text in IGNORED]


def rebuilt(x: Tensor, v_GM: Tensor) -> Tensor:
    x_TD = x.reshape(-1, x.shape[-1])
    z_TG = reference.compress(x_TD, v_GM.to(x.dtype))
    return reference.reconstruct(z_TG, v_GM.to(x.dtype), x.shape[-1]).view(x.shape)


def vectors_of(layer: Any, features: int) -> Tensor:
    """The vectors for the layer's input: of the adapter itself, or of its lora_A."""
    if isinstance(layer, CompressedAdapter):
        sites = layer.velora_adapter.sites.items()
        (site,) = (s for key, s in sites if s.features == features and key.endswith("-1"))
        return site.vectors
    (matrix,) = (m for m in layer.modules() if isinstance(m, CompressedLayer))
    return matrix.velora_vectors


def gradients(layer: nn.Module, x: Tensor, dY: Tensor) -> dict[str, Tensor]:
    """What a plain layer's trained parameters get."""
    layer.zero_grad()
    layer(x).backward(dY)
    return {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def gradient_of(layer: nn.Module, name: str) -> Tensor:
    """The gradient of a parameter, through the coefficients where it has some."""
    owner = layer.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, CompressedLayer) and name.endswith(".weight"):
        assert owner.coef.grad is not None
        return reference.expand(owner.coef.grad, owner.velora_vectors, owner.features)
    gradient = layer.get_parameter(name).grad
    assert gradient is not None, name
    return gradient


def one_step(method: str, name: str, dtype: torch.dtype) -> list[tuple[Any, Any, Any]]:
    """(plain layer, compressed layer, its input and output gradient) of each adapted layer."""
    plain = adapted(method, name, dtype)
    model = compressed(plain)
    inputs = {}
    for key, layer in layers_of(model).items():
        context = inputs_of(layer)
        inputs[key] = context.__enter__()
    run(model, batch_of(name, dtype=dtype)).float().square().mean().backward()
    return [(layers_of(plain)[key], layer, inputs[key]) for key, layer in layers_of(model).items()]


@pytest.mark.parametrize(("method", "name"), PAIRS, ids=[f"{m}-{n}" for m, n in PAIRS])
def test_against_plain_peft(method: str, name: str):
    spec = METHODS[method]
    checked = set()
    for plain, layer, seen in one_step(method, name, torch.float64):
        x, dY = seen["x"], seen["dY"]
        exact = gradients(plain, x, dY)
        wanted: dict[str, Tensor] = {}
        if spec.rebuilt:
            wanted = gradients(copy.deepcopy(plain), rebuilt(x, vectors_of(layer, x.shape[-1])), dY)
        for key, gradient in exact.items():
            kind = key.split(".")[0]
            if kind in spec.rebuilt:
                assert_close(gradient_of(layer, key), wanted[key], 1e-9)
                checked.add(kind)
            elif kind in spec.exact:
                assert_close(gradient_of(layer, key), gradient, 1e-9)
                checked.add(kind)
            else:
                assert gradient_of(layer, key).abs().sum() > 0, key
    assert checked >= {*spec.rebuilt, *spec.exact}


REBUILT = [(method, name) for method, name in PAIRS if METHODS[method].rebuilt]


@pytest.mark.parametrize(("method", "name"), REBUILT, ids=[f"{m}-{n}" for m, n in REBUILT])
def test_in_bfloat16(method: str, name: str):
    spec, dtype = METHODS[method], torch.bfloat16
    for plain, layer, seen in one_step(method, name, dtype):
        x, dY = seen["x"].double(), seen["dY"].double()
        x_hat = rebuilt(x, vectors_of(layer, x.shape[-1]).double())
        wanted = gradients(plain.double(), x_hat, dY)
        for key, gradient in wanted.items():
            if key.split(".")[0] in spec.rebuilt:
                assert_close(gradient_of(layer.float(), key), gradient, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_scale_of_the_output(name: str):
    """(IA)³ scales what a layer gives (attention), and VeRA what its adapter gives."""
    for plain, layer, seen in one_step("ia3", name, torch.float64):
        with torch.no_grad():
            base = plain.base_layer(seen["x"])
        activation, dY = base, seen["dY"]
        if plain.is_feedforward:
            activation, dY = seen["x"], _through(plain.base_layer, seen["x"], dY)
        v = vectors_of(layer, activation.shape[-1])
        wanted = (dY * rebuilt(activation, v)).reshape(-1, activation.shape[-1]).sum(0)
        assert_close(layer.ia3_l["default"].grad.flatten(), wanted, 1e-10)
    for plain, layer, seen in one_step("vera", name, torch.float64):
        lambda_b = plain.vera_lambda_b["default"]
        with torch.no_grad():
            added = (plain(seen["x"]) - plain.base_layer(seen["x"])) / lambda_b
        v = vectors_of(layer, added.shape[-1])
        wanted = (seen["dY"] * rebuilt(added, v)).reshape(-1, added.shape[-1]).sum(0)
        assert_close(layer.vera_lambda_b["default"].grad, wanted, 1e-8)


def _through(base: nn.Module, x: Tensor, dY: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (dX,) = torch.autograd.grad(base(x), x, dY)
    return dX


def test_two_matrices_after_another():
    """VB-LoRA's bank makes both matrices: it gets the rebuilt and the exact part."""
    for plain, layer, seen in one_step("vblora", "llama", torch.float64):
        x, dY = seen["x"], seen["dY"]
        exact = gradients(plain, x, dY)
        x_hat = rebuilt(x, vectors_of(layer, x.shape[-1]))
        wanted = gradients(copy.deepcopy(plain), x_hat, dY)
        assert_close(
            gradient_of(layer, "vblora_logits_A.default"), wanted["vblora_logits_A.default"], 1e-10
        )
        assert (exact["vblora_logits_A.default"] - wanted["vblora_logits_A.default"]).norm() > 0
