"""Quantised (and merely frozen) linear layers and models: no GPU, no hub."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.layers import CompressedLayer

DTYPE = torch.bfloat16
GROUPS = 4


def _four_bit(kind: str, double: bool) -> Callable[[nn.Linear], nn.Module]:
    def convert(plain: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear4bit(
            plain.in_features,
            plain.out_features,
            plain.bias is not None,
            compute_dtype=DTYPE,
            compress_statistics=double,
            quant_type=kind,
        )
        layer.load_state_dict(plain.state_dict())
        return layer.to("cpu")

    return convert


def _eight_bit(plain: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    features, outputs = plain.in_features, plain.out_features
    layer = bnb.nn.Linear8bitLt(features, outputs, plain.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def _torchao(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def convert(plain: nn.Linear) -> nn.Module:
        torchao = pytest.importorskip("torchao.quantization")
        if bits == 8:
            config = torchao.Int8WeightOnlyConfig()
        else:  # Int4WeightOnlyConfig has no kernel for CPUs; this one keeps 4-bit codes in int8
            group = torchao.PerGroup(8)
            config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
        holder = nn.Sequential(copy.deepcopy(plain))
        torchao.quantize_(holder, config)
        return holder[0]

    return convert


CONVERT: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": _four_bit("nf4", False),
    "nf4-double": _four_bit("nf4", True),
    "fp4": _four_bit("fp4", False),
    "int8": _eight_bit,
    "torchao-int8": _torchao(8),
    "torchao-int4": _torchao(4),
    "frozen-bf16": copy.deepcopy,
}
BASES = list(CONVERT)
QUANTISED = [base for base in BASES if base != "frozen-bf16"]
BITSANDBYTES = ["nf4", "nf4-double", "fp4", "int8"]


def layer(base: str, features: int = 64, outputs: int = 32, bias: bool = True) -> nn.Module:
    """A frozen layer in training mode, of bfloat16."""
    plain = nn.Linear(features, outputs, bias).to(DTYPE).requires_grad_(False)
    return CONVERT[base](plain).requires_grad_(False).train()


def convert(model: nn.Module, base: str, skip: str = "lm_head") -> nn.Module:
    """Quantise the linear layers of a model in place, and freeze all of it."""
    model.to(DTYPE).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and skip not in name:
            model.set_submodule(name, CONVERT[base](module).requires_grad_(False))
    return model


def config(**settings: Any) -> VeloraConfig:
    """Coefficients on what is frozen."""
    given = {"num_groups": GROUPS, "train_frozen": True, "fold_every": None} | settings
    return VeloraConfig(**given)


def compress(plain: nn.Module, **settings: Any) -> CompressedLayer:
    """A compressed copy of a layer, named "0" in a model of its own."""
    model = nn.Sequential(copy.deepcopy(plain)).train()
    velora_torch.compress(model, config(**settings))
    (compressed,) = model
    assert isinstance(compressed, CompressedLayer)
    return compressed


def saved(model: nn.Module, x: Any) -> list[Tensor]:
    """The tensors that a training forward keeps, one for each storage, without the model's own."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        kept[alias.untyped_storage().data_ptr()] = alias
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    own = {
        t.untyped_storage().data_ptr()
        for t in [*model.parameters(), *model.buffers()]
        if type(t) in (Tensor, nn.Parameter) or "bitsandbytes" in type(t).__module__
    }
    del y
    return [tensor for address, tensor in kept.items() if address not in own]
