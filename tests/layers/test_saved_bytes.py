"""What autograd keeps: z (T x G) and the weight, and nothing of the size of the input."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig

from .cases import GRADIENTS, KINDS, Make, compress

T, D, G, O = 40, 96, 8, 24  # noqa: E741


def saved(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors that a training forward keeps, one for each storage, without the model's own."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        kept[alias.untyped_storage().data_ptr()] = alias
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    del y
    return [tensor for address, tensor in kept.items() if address not in own]


def shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return sorted(tuple(t.shape) for t in tensors)


def storage_numbers(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


@pytest.mark.parametrize("needs_dx", [True, False], ids=["dX", "no-dX"])
@pytest.mark.parametrize("groups", [G, 7], ids=["divisible", "cut"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
def test_a_layer_keeps_z(make: Make, gradient: str, groups: int, needs_dx: bool):
    layer = compress(make(D, O), groups, gradient=gradient)
    kept = saved(layer, torch.randn(4, T // 4, D).requires_grad_(needs_dx))
    assert shapes(kept) == [(T, groups)]
    assert storage_numbers(kept[0]) == T * groups


@pytest.mark.parametrize("make", KINDS)
def test_a_plain_layer_keeps_its_input(make: Make):
    """The yardstick of the tests here."""
    kept = saved(make(D, O), torch.randn(T, D))
    assert [storage_numbers(t) for t in kept] == [T * D]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"]
)
def test_z_has_the_type_of_the_input(gradient: str, dtype: torch.dtype):
    layer = compress(nn.Linear(D, O).to(dtype), G, gradient=gradient)
    (z,) = saved(layer, torch.randn(T, D).to(dtype))
    assert z.dtype == dtype
    assert z.untyped_storage().nbytes() == T * G * dtype.itemsize


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", KINDS)
def test_nobody_holds_the_input(make: Make, gradient: str):
    """Neither as a saved tensor, nor in any other way."""
    layer = compress(make(D, O), G, gradient=gradient)
    x = torch.randn(T, D)
    alive = weakref.ref(x)
    y = layer(x)
    del x
    assert alive() is None
    y.sum().backward()


def test_pending_coefficients_keep_no_more():
    layer = compress(nn.Linear(D, O), G, fold_every=None)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x = torch.randn(T, D)
    layer(x).square().mean().backward()
    optimizer.step()
    assert layer.velora.pending
    assert shapes(saved(layer, x)) == [(T, G)]
    # Along sign(v), the signs are kept too: as many numbers as one token has.
    layer.velora.direction = "sign"
    assert shapes(saved(layer, x)) == [(G, D // G), (T, G)]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_mlp(gradient: str):
    hidden = 128
    model = nn.Sequential(nn.Linear(D, hidden), nn.GELU(), nn.Linear(hidden, O))
    velora_torch.compress(model, VeloraConfig(num_groups=G, gradient=gradient))
    kept = saved(model, torch.randn(T, D, requires_grad=True))
    # GELU keeps its own input (T x hidden); neither x nor GELU's output is kept.
    assert shapes(kept) == [(T, G), (T, G), (T, hidden)]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_autocast(gradient: str):
    layer = compress(nn.Linear(D, O), G, gradient=gradient)
    with torch.autocast("cpu", torch.bfloat16):
        (z,) = saved(layer, torch.randn(T, D, requires_grad=True))
    assert z.dtype == torch.bfloat16
    assert storage_numbers(z) == T * G


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
def test_lora_on_a_bf16_model(adapter: str):
    """PEFT casts the input of a float32 adapter: that copy must not be kept either."""
    peft = pytest.importorskip("peft")
    rank, features = 4, D
    model: Any = nn.Sequential(nn.Linear(features, O)).to(torch.bfloat16)
    config = peft.LoraConfig(r=rank, target_modules=["0"])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=adapter == "fp32").train()
    x = torch.randn(T, features).bfloat16()
    plain = sum(t.untyped_storage().nbytes() for t in saved(model, x))
    velora_torch.compress(model, VeloraConfig(targets=["lora_A"], num_groups=G))
    kept = saved(model, x)
    bytes_each = 4 if adapter == "fp32" else 2
    assert max(storage_numbers(t) for t in kept) == T * G
    saving = plain - sum(t.untyped_storage().nbytes() for t in kept)
    assert saving == T * (features - G) * bytes_each


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_frozen_layer_keeps_nothing(gradient: str):
    layer = compress(nn.Linear(D, O), G, gradient=gradient).requires_grad_(False)
    assert saved(layer, torch.randn(T, D)) == []
    assert saved(layer, torch.randn(T, D, requires_grad=True)) == []  # dX needs the weight alone


def test_evaluation_keeps_nothing():
    layer = compress(nn.Linear(D, O), G)
    with torch.no_grad():
        assert saved(layer, torch.randn(T, D)) == []


def test_reading_the_weight_keeps_nothing():
    layer = compress(nn.Linear(D, O), G)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(self.layer.weight.dtype))

    assert shapes(saved(Reads(), torch.randn(T, D))) == [(T, G)]
