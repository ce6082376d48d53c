"""torch.compile without graph breaks gives the eager numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.layers import CompressedLayer

from ..closeness import assert_close
from .cases import KINDS, Make

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

SETTINGS = [
    pytest.param({}, id="average"),
    pytest.param({"gradient": "dense"}, id="dense"),
    pytest.param({"init": "random", "vectors": "per_group", "refresh_every": 2}, id="random"),
    pytest.param({"init": "running_average"}, id="running"),
    pytest.param({"fold_every": 3}, id="pending"),
]


class Reads(nn.Module):
    """Reads the weight before it calls the layer, as PEFT does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype)).relu_()


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check_training(model: nn.Module, drawn: bool, steps: int = 4) -> None:
    """Train a compiled and an eager copy; outputs, gradients and weights must agree."""
    eager = copy.deepcopy(model)
    data = [torch.randn(2, 5, 10, dtype=torch.float64) + 0.3 for _ in range(steps)]
    if drawn:
        model(data[0])
        eager(data[0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, eager)]
    for batch in data:
        results = []
        for run, optimizer in zip((compiled, eager), optimizers, strict=True):
            x = batch.clone().requires_grad_()
            optimizer.zero_grad()
            y = run(x)
            y.square().mean().backward()
            results.append((y.detach(), x.grad))
            optimizer.step()
        for a, b in zip(*results, strict=True):
            assert_close(a, b, 1e-10)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
def test_training_from_the_first_step(settings: dict[str, Any]):
    """Which draws v; from the second one on, v is there."""
    model = nn.Sequential(nn.Linear(10, 12), nn.GELU(), nn.Linear(12, 4)).double()
    velora_torch.compress(model, VeloraConfig(num_groups=4, **settings))
    check_training(model, drawn=False)


@pytest.mark.parametrize("make", KINDS)
def test_kinds(make: Make):
    model = nn.Sequential(make(10, 12).double())
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    check_training(model, drawn=True)


def test_weight_read_inside():
    model = Reads(nn.Linear(10, 6).double())
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    check_training(model, drawn=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_lora():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(10, 12)).double()
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).double()
    velora_torch.compress(model, VeloraConfig(targets=["lora_A"], num_groups=4))
    assert any(isinstance(m, CompressedLayer) for m in model.modules())
    check_training(model.base_model.model, drawn=True)
