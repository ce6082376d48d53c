"""Stand-ins keep what bitsandbytes and galore_torch keep, to the byte."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.memory.count import optimizer_state_bytes, saved_bytes, unique_bytes
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.simulator.four_bit import (
    Linear4bit,
    layer_bytes,
    quantise_like_bitsandbytes,
)
from velora_torch.memory.simulator.optimizers import OPTIMIZERS, GaLoreAdamW, make_optimizer
from velora_torch.memory.simulator.tracker import Tracker

from ... import tiny_models

SHAPES = [(64, 64), (100, 33), (7, 5), (130, 257)]
MATRIX_BYTES = 4 * 64 * 48


def bytes_of(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def real_4bit(weight: Tensor, double: bool, bias: Tensor | None = None) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=double,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    layer.support_avx512bf16_for_cpu = False
    return layer.requires_grad_(False).to("cpu")


def held(layer: Any) -> list[Tensor]:
    """What a real 4-bit layer keeps."""
    state = layer.weight.quant_state
    tensors = [layer.weight, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


# ------------------------------------------------------------------ 4-bit layers


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES, ids=bytes_of)
def test_a_layer_is_as_large_as_the_real_one(shape: tuple[int, int], double: bool):
    weight = torch.randn(shape).bfloat16()
    layer = Linear4bit(weight, double=double)
    real = real_4bit(weight, double)
    ours = unique_bytes([*layer.parameters(), *layer.buffers()])
    assert ours == unique_bytes(held(real)) == layer_bytes(shape, double)
    assert layer.weight.shape == real.weight.shape
    assert layer.weight.dtype == real.weight.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_saves_and_gives_what_the_real_one_does(dtype: torch.dtype):
    weight, bias = torch.randn(40, 24).bfloat16(), torch.randn(40).bfloat16()
    seen = []
    for layer in (Linear4bit(weight, bias), real_4bit(weight, True, bias)):
        x = torch.randn(2, 9, 24, dtype=dtype, requires_grad=True)
        own = unique_bytes([layer.weight])
        outer = nn.Sequential(layer)
        with saved_bytes(outer) as count:
            y = outer(x)
        kept = count()
        y.sum().backward()
        assert x.grad is not None
        assert not layer.weight.requires_grad
        seen.append((kept, y.dtype, y.shape, x.grad.dtype, x.grad.shape, own))
    assert seen[0] == seen[1]
    assert seen[0][0] == 0


def test_nobody_holds_the_input_of_a_layer():
    layer = Linear4bit(torch.randn(40, 24).bfloat16())
    leaf = torch.randn(9, 24, requires_grad=True)
    x = leaf * 1.0
    alive = weakref.ref(x)
    y = layer(x)
    del x
    assert alive() is None
    assert y.requires_grad


def test_the_dequantised_weight_is_a_temporary_of_both_passes():
    outputs, features, tokens = 512, 256, 3
    world = FakeWorld()
    layer = world.model(nn.Sequential(Linear4bit(torch.empty(outputs, features).bfloat16())))
    with world:
        x = torch.empty(tokens, features, dtype=torch.bfloat16, requires_grad=True)
        tracker = Tracker(block=1)
        with tracker.watch(layer, [x]), tracker:
            with tracker.phase("forward"):
                y = layer(x).sum()
            with tracker.phase("backward"):
                y.backward()
    dequantised = 2 * outputs * features
    for phase in ("forward", "backward"):
        temporary = tracker.peaks[phase].by_category()["temporary"]
        assert dequantised <= temporary < 1.2 * dequantised
    # Both matrix products are known as such: none is taken for a weight gradient.
    product = 2 * tokens * outputs * features
    assert (tracker.flops.forward, tracker.flops.input_gradients) == (product, product)
    assert tracker.flops.weight_gradients == 0


# ------------------------------------------------------------------ whole models

MODELS = [tiny_models.llama, tiny_models.gpt2, tiny_models.bert, tiny_models.vit]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_is_quantised_where_transformers_does_it_llama(tied: bool):
    check_choice(tiny_models.llama(tied=tied))


@pytest.mark.parametrize("make", MODELS[1:], ids=lambda make: make.__name__)
def test_a_model_is_quantised_where_transformers_does_it(make: Any):
    check_choice(make())


def check_choice(model: Any) -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and should_convert_module(name, kept)
    }
    assert expected
    shapes = {name: model.get_submodule(name).weight.shape for name in expected}
    quantise_like_bitsandbytes(model)
    found = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert found == expected
    for name in found:
        layer = model.get_submodule(name)
        assert {layer.in_features, layer.out_features} == set(shapes[name])


def test_prepared_as_peft_prepares():
    peft = pytest.importorskip("peft")
    model = tiny_models.llama().to(torch.bfloat16)
    quantised = quantise_like_bitsandbytes(model, prepare=False)
    before = {name: p.dtype for name, p in quantised.named_parameters()}
    assert before["lm_head.weight"] == torch.bfloat16
    ours = quantise_like_bitsandbytes(tiny_models.llama().to(torch.bfloat16))
    theirs = peft.prepare_model_for_kbit_training(quantised, use_gradient_checkpointing=False)
    expected = {name: (p.dtype, p.requires_grad) for name, p in theirs.named_parameters()}
    assert {name: (p.dtype, p.requires_grad) for name, p in ours.named_parameters()} == expected
    assert expected["lm_head.weight"] == (torch.float32, False)
    assert expected["model.layers.0.mlp.up_proj.weight"] == (torch.uint8, False)


def test_tied_weights_stay_tied_when_cast():
    model = quantise_like_bitsandbytes(tiny_models.llama(tied=True).to(torch.bfloat16))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_qlora_with_compressed_adapters_on_fake_tensors():
    peft = pytest.importorskip("peft")
    world = FakeWorld()
    model = quantise_like_bitsandbytes(world.model(tiny_models.llama().to(torch.bfloat16)))
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    # Outside of the world, since PEFT moves modules, and on meta, since it initialises them.
    model = world.model(peft.get_peft_model(model, config, low_cpu_mem_usage=True)).train()
    batch = world.batch(tiny_models.token_batch())
    saved = []
    with world:
        for compressed in (False, True):
            if compressed:
                velora_torch.compress(model, VeloraConfig(targets=["lora_A"], num_groups=4))
            tracker = Tracker(block=1)
            with tracker.watch(model), tracker:
                with tracker.phase("forward"):
                    loss = model(**batch, labels=batch["input_ids"]).loss
                with tracker.phase("backward"):
                    loss.backward()
            saved.append(tracker.saved)
        make_optimizer("adamw", model).step()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * 2 * 7
    assert all("lora_B" in name or name.endswith("lora_A.default.coef") for name in trained)
    assert saved[1] < saved[0]


def test_nothing_to_quantise():
    with pytest.raises(ValueError, match="no linear layer of Sequential can be quantised"):
        quantise_like_bitsandbytes(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="besides lm_head, proj"):
        quantise_like_bitsandbytes(nn.Sequential(nn.LayerNorm(4)), skip=["lm_head", "proj"])


def test_named_modules_are_skipped():
    model = quantise_like_bitsandbytes(tiny_models.llama(), skip=["lm_head", "layers.0", "v_proj"])
    kept = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert "lm_head" in kept
    assert "model.layers.1.self_attn.v_proj" in kept
    assert "model.layers.1.self_attn.q_proj" not in kept


# ------------------------------------------------------------------ optimizers

PARAMETERS = [(64, 64), (4095,), (100, 41), (5000,), (3, 3)]


def with_gradients(shapes: list[Any], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_8bit_states_are_bitsandbytes(dtype: torch.dtype):
    bnb = pytest.importorskip("bitsandbytes")
    parameters = with_gradients(PARAMETERS, dtype)
    real = bnb.optim.AdamW8bit(parameters, lr=1e-3)
    real.step()
    ours = OPTIMIZERS["adamw_8bit"](parameters)
    ours.step()
    ours.step()
    for parameter in parameters:
        theirs = {k: v for k, v in real.state[parameter].items() if isinstance(v, Tensor)}
        assert {k: (v.shape, v.dtype) for k, v in ours.state[parameter].items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.items()
        }
    assert optimizer_state_bytes(ours) == optimizer_state_bytes(real)


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (50, 50)], ids=bytes_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_galore_states(shape: tuple[int, int], dtype: torch.dtype):
    rank, (rows, columns) = 8, shape
    parameter, bias = with_gradients([shape, (10,)], dtype)
    optimizer = GaLoreAdamW([{"params": [bias]}, {"params": [parameter], "rank": rank}])
    parameter.detach().zero_()
    optimizer.step()
    low = (rows, rank) if rows >= columns else (rank, columns)
    state = optimizer.state[parameter]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == low
    assert state["exp_avg"].dtype == state["projection"].dtype == dtype
    # A float32 projection is a view of all singular vectors; galore_torch keeps it that way.
    short = min(shape)
    vectors = short * (short if dtype == torch.float32 else rank)
    moments = 2 * rank * max(shape)
    assert optimizer_state_bytes(optimizer) == dtype.itemsize * (vectors + moments + 2 * 10)
    assert torch.linalg.matrix_rank(parameter.float(), rtol=0.05) == rank


def test_galore_of_full_rank_is_rotated_adam():
    """With all singular vectors, an update of a diagonal gradient is Adam's own."""
    parameter = nn.Parameter(torch.zeros(6, 6))
    parameter.grad = torch.diag(torch.arange(1.0, 7.0))
    GaLoreAdamW([{"params": [parameter], "rank": 6, "scale": 1.0}], lr=0.1).step()
    assert torch.allclose(parameter, -0.1 * torch.eye(6), atol=1e-5)


def test_galore_projects_linear_layers_alone():
    model = tiny_models.llama()
    optimizer = make_optimizer("galore_adamw", model, rank=4)
    projected = {
        id(p) for group in optimizer.param_groups if "rank" in group for p in group["params"]
    }
    names = {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if id(p) in projected}
    assert names == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_on_fake_tensors_keeps_the_states_of_a_real_one(name: str):
    real_parameters = with_gradients([(64, 48), (4100,), (4095,)])
    world = FakeWorld()
    with world:
        fakes = [nn.Parameter(torch.empty(p.shape)) for p in real_parameters]
        for fake in fakes:
            fake.grad = torch.empty_like(fake)
        fake_optimizer = OPTIMIZERS[name](fakes)
        tracker = Tracker(block=1)
        with tracker, tracker.phase("optimizer"):
            fake_optimizer.step()
        tracker.note_states(fake_optimizer)
    real = OPTIMIZERS[name](real_parameters)
    real.step()
    counted = tracker.totals()["optimizer_state"]
    assert counted == optimizer_state_bytes(real)
    assert (counted == 0) == (name == "sgd")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sgd_momentum", 0), ("adamw_fused", 0), ("adamw_8bit", 0), ("adamw", 2 * MATRIX_BYTES)],
)
def test_temporaries_of_a_step(name: str, expected: int):
    """torch's foreach AdamW makes denominators for all parameters at once, the others none."""
    with FakeWorld():
        parameters = [nn.Parameter(torch.empty(64, 48)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = OPTIMIZERS[name](parameters)
        optimizer.step()
        tracker = Tracker(block=1)
        tracker.note_weights(nn.ParameterList(parameters))
        before = sum(tracker.totals().values())
        with tracker, tracker.phase("second"):
            optimizer.step()
    peak = tracker.peaks["second"].total - before if "second" in tracker.peaks else 0
    assert before == 2 * MATRIX_BYTES
    assert peak == expected


@pytest.mark.parametrize("name", ["adamw_8bit", "galore_adamw"])
def test_coefficients_take_a_step(name: str):
    model = tiny_models.net()
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    optimizer = make_optimizer(name, model)
    tiny_models.step(model, optimizer, tiny_models.batches(1)[0])
    coefs = [p for n, p in model.named_parameters() if n.endswith("coef")]
    assert all(optimizer.state[coef] for coef in coefs)
    assert not any(coef.any() for coef in coefs)  # folded


def test_galore_on_coefficients_themselves_is_refused():
    model = tiny_models.net()
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    optimizer = OPTIMIZERS["galore_adamw"]([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="projects their gradient"):
        tiny_models.step(model, optimizer, tiny_models.batches(1)[0])


def test_unknown_optimizer_and_nothing_to_train():
    with pytest.raises(ValueError, match="no optimizer 'adam'; there are: sgd"):
        make_optimizer("adam", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        make_optimizer("sgd", nn.Linear(2, 2).requires_grad_(False))
