"""LoRA adapters compressed on top of quantised bases: the paper's QLoRA + VeLoRA."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.integrations.bitsandbytes import keep_differentiable
from velora_torch.layers.quantized import LeanBase
from velora_torch.model import compressed_layers
from velora_torch.subtoken import reference

from ..closeness import TOLERANCE, assert_bitwise, assert_close
from ..tiny_models import bert, llama, loss_of, run, token_batch, train
from .cases import BASES, DTYPE, GROUPS, convert, layer, saved

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
]

T, D, O, RANK = 10, 64, 32, 3  # noqa: E741
NEAR = TOLERANCE[DTYPE]
CONFIG = VeloraConfig(targets=["lora_A"], num_groups=GROUPS)
ADAPTERS = ["fp32", "bf16"]


def adapted(base: str, adapter: str) -> Any:
    """One quantised layer under LoRA, whose lora_B is not zero any more."""
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"])
    model = nn.Sequential(layer(base))
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=adapter == "fp32")
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_(0, 0.1)
    return model.train()


def inputs() -> Tensor:
    return (torch.randn(2, T // 2, D) + 0.5).to(DTYPE).requires_grad_()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", BASES)
def test_all_but_lora_a_is_exact(base: str, adapter: str):
    plain = adapted(base, adapter)
    model = velora_torch.compress(copy.deepcopy(plain), CONFIG)
    x = inputs()
    x_plain = x.detach().clone().requires_grad_()
    y, y_plain = model(x), plain(x_plain)
    assert_bitwise(y, y_plain)
    dY = torch.randn_like(y)
    y.backward(dY)
    y_plain.backward(dY)
    if base.startswith("torchao"):  # theirs scales after the product, ours before it
        assert_close(x.grad, x_plain.grad, NEAR)
    else:
        assert_bitwise(x.grad, x_plain.grad)
    lora, lora_plain = model.base_model.model[0], plain.base_model.model[0]
    assert_bitwise(lora.lora_B["default"].weight.grad, lora_plain.lora_B["default"].weight.grad)
    a = lora.lora_A["default"]
    z = reference.compress(x.detach().double().reshape(-1, D), a.velora_vectors.double())
    d_inner = 2.0 * dY.double().reshape(-1, O) @ lora.lora_B["default"].weight.double()
    assert_close(a.coef.grad, d_inner.T @ z, NEAR)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", BASES)
def test_no_copy_of_the_input_is_kept(base: str, adapter: str):
    """Neither the library's own operator nor PEFT's cast to float32 keeps one."""
    model = velora_torch.compress(adapted(base, adapter), CONFIG)
    kept = saved(model, inputs())
    # z of lora_A, and the input of lora_B; PEFT makes adapters on int8 layers in float32 anyway.
    assert sorted(t.numel() for t in kept) == [T * RANK, T * GROUPS]
    width = model.base_model.model[0].lora_B["default"].weight.element_size()
    assert width == 4 or adapter == "bf16"
    assert sum(t.untyped_storage().nbytes() for t in kept) == T * (GROUPS + RANK) * width
    held = inputs() * 1
    alive = weakref.ref(held)
    y = model(held)
    del held
    assert alive() is None
    y.sum().backward()


@pytest.mark.parametrize("base", ["int8", "torchao-int8", "torchao-int4"])
def test_lean_bases_come_and_go(base: str):
    """Bases whose own operator keeps too much get our backward pass, until `restore`."""
    plain = adapted(base, "bf16")
    model = velora_torch.compress(copy.deepcopy(plain), CONFIG)
    base_layer = model.base_model.model[0].base_layer
    assert isinstance(base_layer, LeanBase)
    exact = velora_torch.summary(model).exact
    assert exact["base_model.model.0.base_layer"] == "frozen: keeps no input"
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = inputs()
    assert_bitwise(copy.deepcopy(model)(x), model(x))
    velora_torch.restore(model)
    assert type(base_layer) is type(plain.base_model.model[0].base_layer)


@pytest.mark.parametrize("build", [llama, bert], ids=["llama", "bert"])
@pytest.mark.parametrize("base", BASES)
def test_models_train_save_and_merge(base: str, build: Any, tmp_path: Any):
    """The adapter that PEFT saves is the trained model."""
    skip = "lm_head" if build is llama else "cls"
    plain = convert(build(), base, skip).eval()
    settings = peft.LoraConfig(r=4, target_modules="all-linear")
    model = peft.get_peft_model(copy.deepcopy(plain), settings)
    velora_torch.compress(model, VeloraConfig(num_groups=GROUPS))
    assert {n.split(".")[-2] for n in compressed_layers(model)} == {"lora_A"}
    before = loss_of(model, token_batch()).item()
    train(model, [token_batch()] * 8, torch.optim.AdamW, lr=1e-2)
    y = run(model, token_batch()).detach()
    assert loss_of(model, token_batch()).item() < 0.9 * before
    model.save_pretrained(tmp_path)
    velora_torch.restore(model)
    assert_close(run(model, token_batch()), y, NEAR)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    keep_differentiable(loaded)
    assert_close(run(loaded.eval(), token_batch()), y, NEAR)
