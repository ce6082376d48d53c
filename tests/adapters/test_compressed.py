"""`velora.compress` on top of SSF and Hydra: exact where it should be, and much less is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.adapters import add_hydra, add_ssf
from velora_torch.layers import CompressedLayer
from velora_torch.layers.scale_shift import CompressedScaleShift
from velora_torch.memory.count import saved_bytes
from velora_torch.model import compressed_layers
from velora_torch.subtoken import reference

from .. import tiny_models
from ..closeness import TOLERANCE, assert_bitwise, assert_close
from ..quantized.cases import QUANTISED, convert
from ..tiny_models import loss_of, token_batch, train
from .models import CASES, VISION, Case, build, disturb, output, trains

GROUPS = 4
METHODS = [pytest.param(add_ssf, "ssf", id="ssf"), pytest.param(add_hydra, "hydra_A", id="hydra")]


def config(part: str, **settings: Any) -> VeloraConfig:
    """By a function, which says nothing of what else is targeted, and warns of nothing."""
    return VeloraConfig(
        targets=lambda name, _: part in name.split("."), num_groups=GROUPS, **settings
    )


def batch_of(case: Case, dtype: torch.dtype) -> Any:
    batch = case[1]()
    if isinstance(batch, Tensor):
        return batch.to(dtype)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def seen_by(model: nn.Module) -> dict[str, Tensor]:
    """Filled with input and output gradient of each compressed layer."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name} x"] = args[0].detach().clone()
            output.register_hook(lambda grad: seen.__setitem__(f"{name} dY", grad.clone()))

        return hook

    for name, layer in compressed_layers(model).items():
        layer.register_forward_hook(note(name))
    return seen


def expected(layer: CompressedLayer, x: Tensor, dY: Tensor) -> Tensor:
    """The reference's gradient of the weight, in float64."""
    v, weight = layer.velora_vectors.double(), layer.raw_weight.detach().double()
    if isinstance(layer, CompressedScaleShift):
        x, dY = x.movedim(layer.dim, -1).double(), dY.movedim(layer.dim, -1).double()
        return reference.scale_shift_gradients(x, weight, dY, v)[1]
    return reference.linear_gradients(x.double(), weight, dY.double(), v)[1]


def actual(layer: CompressedLayer) -> Tensor | None:
    if layer._parameters["coef"] is None:
        return layer.raw_weight.grad
    assert layer.coef.grad is not None
    return reference.expand(layer.coef.grad.double(), layer.velora_vectors.double(), layer.features)


@pytest.mark.filterwarnings("ignore::velora_torch.memory.freed.TargetWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize(("add", "part"), METHODS)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: Case, add: Any, part: str, dtype: torch.dtype):
    model = add(build(case, dtype))
    disturb(model)
    batch = batch_of(case, dtype)
    y = output(model, batch)
    y.float().square().mean().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    velora_torch.compress(model.train(), config(part))
    layers = compressed_layers(model)
    assert len(layers) >= 10
    seen = seen_by(model)
    again = output(model, batch)
    assert_bitwise(again, y)
    again.float().square().mean().backward()
    for name, layer in layers.items():
        wanted = expected(layer, seen[f"{name} x"], seen[f"{name} dY"])
        assert_close(actual(layer), wanted, TOLERANCE[dtype])
    compressed = {f"{name}.weight" for name in layers}
    for name, p in model.named_parameters():
        if name in plain and name not in compressed:  # shifts, up-projections, the head: exact
            assert_close(p.grad, plain[name], TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore::velora_torch.memory.freed.TargetWarning")
@pytest.mark.parametrize("base", QUANTISED)
@pytest.mark.parametrize(("add", "part"), METHODS)
def test_gradients_on_quantised_bases(add: Any, part: str, base: str):
    model = add(convert(tiny_models.llama().float(), base))
    disturb(model)
    velora_torch.compress(model.train(), config(part))
    seen = seen_by(model)
    output(model, token_batch()).float().square().mean().backward()
    layers = compressed_layers(model)
    assert len(layers) >= 10
    for name, layer in layers.items():
        wanted = expected(layer, seen[f"{name} x"], seen[f"{name} dY"])
        assert_close(actual(layer), wanted, TOLERANCE[torch.bfloat16])


@pytest.mark.filterwarnings("ignore::velora_torch.memory.freed.TargetWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("add", "part"), METHODS)
@pytest.mark.parametrize("case", VISION)
def test_saved_bytes_fall(case: Case, add: Any, part: str, dtype: torch.dtype):
    """By almost half and more, already in small models whose attention maps count."""
    model = add(build(case, dtype)).train()
    batch = batch_of(case, dtype)
    with saved_bytes(model) as plain:
        y = output(model, batch)
    before = plain()
    del y
    velora_torch.compress(model, config(part))
    output(model, batch)  # draws
    with saved_bytes(model) as compressed:
        y = output(model, batch)
    assert compressed() < 0.62 * before
    y.sum().backward()


@pytest.mark.parametrize("case", VISION)
def test_what_ssf_frees_is_the_operators_outputs(case: Case):
    """T x D numbers for each become T x G."""
    model = add_ssf(build(case)).train()
    batch = case[1]()
    sizes: list[tuple[int, int]] = []
    for module in model.modules():
        if type(module).__name__ == "ScaleShift":
            module.register_forward_hook(
                lambda m, args, _: sizes.append((args[0].numel(), len(m.weight)))
            )
    with saved_bytes(model) as plain:
        y = output(model, batch)
    before = plain()
    del y
    velora_torch.compress(model, config("ssf"))
    numbers = sizes.copy()
    output(model, batch)
    with saved_bytes(model) as compressed:
        output(model, batch)
    freed = sum(count - count // features * GROUPS for count, features in numbers)
    assert before - compressed() == 8 * freed


@pytest.mark.parametrize("add", [add_ssf, add_hydra])
@pytest.mark.parametrize("case", CASES)
def test_all_linear(case: Case, add: Any):
    """The adapters; no head, no up-projection, and nothing of the frozen base."""
    model = add(build(case))
    velora_torch.compress(model, VeloraConfig(num_groups=GROUPS))
    names = set(compressed_layers(model))
    assert names
    assert {name.rpartition(".")[2] for name in names} <= {"ssf", "hydra_A"}
    table = velora_torch.summary(model)
    ups = {n: why for n, why in table.exact.items() if n.endswith("hydra_B")}
    assert bool(ups) == (add is add_hydra)
    assert all(why.startswith("up-projection of an adapter") for why in ups.values())


def test_an_up_projection_can_be_named():
    model = add_hydra(build(VISION[0].values[0]), rank=8)  # type: ignore[arg-type]
    velora_torch.compress(model, VeloraConfig(targets=["hydra_B"], num_groups=2))
    assert all(name.endswith("hydra_B") for name in compressed_layers(model))


@pytest.mark.filterwarnings("ignore::velora_torch.memory.freed.TargetWarning")
@pytest.mark.parametrize(("add", "part"), METHODS)
@pytest.mark.parametrize("case", CASES)
def test_training_lowers_the_loss_and_restores(case: Case, add: Any, part: str):
    model = add(build(case))
    names, kinds = trains(model), {n: type(m) for n, m in model.named_modules()}
    velora_torch.compress(model, config(part))
    batch = case[1]()
    before = loss_of(model, batch).item()
    train(model, [batch] * 4, torch.optim.AdamW, lr=0.003)
    after = loss_of(model, batch)
    assert after.item() < before
    velora_torch.restore(model)
    assert trains(model) == names
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert_close(loss_of(model, batch), after, 1e-10)


@pytest.mark.filterwarnings("ignore::velora_torch.memory.freed.TargetWarning")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("add", "part"), METHODS)
def test_under_gradient_checkpointing(add: Any, part: str):
    case: Case = VISION[0].values[0]  # type: ignore[assignment]
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = add(build(case)).train()
        disturb(model)
        if checkpointed:
            model.gradient_checkpointing_enable()
        velora_torch.compress(model, config(part))
        loss_of(model, case[1]()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in gradients[0].items():
        assert_close(gradients[1][name], grad, 1e-12)
