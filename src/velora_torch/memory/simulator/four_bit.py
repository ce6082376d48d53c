"""4-bit layers without bitsandbytes: the bytes that it keeps, and no values.

A plan needs neither its kernels nor a GPU, and its kernels' temporaries don't show on fake tensors.

Shapes: T tokens, D input features, O output features.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F

from velora_torch.heads import output_heads
from velora_torch.layers import is_conv1d, linear_shape

ModelT = TypeVar("ModelT", bound=nn.Module)

BLOCK = 64
"""Weights that share a scale."""
NESTED_BLOCK = 256
"""Scales that share a scale, with double quantisation."""


class Linear4bit(nn.Linear):
    """A frozen layer as large as bitsandbytes' NF4 and FP4 layers, whose weights are all zero.

    Args:
        weight: a weight (O x D) of the type, device and kind (fake, meta, real) wanted; not read.
        bias: kept as it is, but frozen.
        double: whether the scales are quantised too.
        compute_dtype: type of the product; ``None`` takes that of the input.
    """

    absmax: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        double: bool = True,
        compute_dtype: torch.dtype | None = torch.bfloat16,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype, self.stored_dtype = compute_dtype, weight.dtype
        packed = _new(weight, (-(-weight.numel() // 2), 1), torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)
        scales = -(-weight.numel() // BLOCK)
        self.register_buffer("code", _new(weight, 16))
        self.register_buffer("absmax", _new(weight, scales, torch.uint8 if double else None))
        if double:
            self.register_buffer("nested_absmax", _new(weight, -(-scales // NESTED_BLOCK)))
            self.register_buffer("nested_code", _new(weight, 256))
            self.register_buffer("offset", _new(weight, ()))

    def forward(self, x: Tensor) -> Tensor:
        """Compute with a dequantised copy of the weight, which nobody keeps."""
        given = x.dtype
        x = x.to(self.compute_dtype or given)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, self.weight, bias, self).to(given)

    def dequantise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weight (O x D), which is the large temporary, and its scales in float32."""
        scales = self.absmax
        if scales.dtype == torch.uint8:
            scales = scales.new_zeros(scales.shape, dtype=torch.float32)
        # From the packed weight alone, so that who counts sees a copy of a weight.
        shape = (self.out_features, self.in_features)
        return self.weight.new_zeros(shape, dtype=dtype), scales


class _Product(Function):
    """``y = x Wᵀ + b`` that keeps the packed weight alone; dX = dY W dequantises it again."""

    @staticmethod
    def forward(x: Tensor, packed: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        weight, _scales = layer.dequantise(x.dtype)
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _x, packed, _bias, layer = inputs
        ctx.save_for_backward(packed)
        ctx.layer = layer

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dY,) = grad_outputs
        layer = ctx.layer
        # Dequantised to the type of the weight that was quantised, unlike in the forward.
        return dY @ layer.dequantise(layer.stored_dtype)[0].to(dY.dtype), None, None, None


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether a module is a quantised 4-bit layer of bitsandbytes; does not import it."""
    loaded = sys.modules.get("bitsandbytes.nn.modules")
    return (
        loaded is not None
        and isinstance(module, loaded.Linear4bit)
        and module.weight.quant_state is not None
    )


def stand_in(layer: Any) -> Linear4bit:
    """The stand-in, on meta, of a quantised layer of bitsandbytes."""
    state = layer.weight.quant_state
    weight = torch.empty(state.shape, dtype=state.dtype, device="meta")
    bias = None if layer.bias is None else layer.bias.detach().to("meta")
    module = Linear4bit(weight, bias, state.nested, layer.compute_dtype)
    return module.train(layer.training)


def layer_bytes(shape: tuple[int, int], double: bool = True) -> int:
    """Bytes that a 4-bit layer without bias keeps for a weight of that shape."""
    numbers = math.prod(shape)
    scales = -(-numbers // BLOCK)
    fixed = 16 * 4
    if not double:
        return -(-numbers // 2) + 4 * scales + fixed
    return -(-numbers // 2) + scales + 4 * -(-scales // NESTED_BLOCK) + fixed + 256 * 4 + 4


def quantise_like_bitsandbytes(
    model: ModelT,
    skip: Iterable[str] | None = None,
    double: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    prepare: bool = True,
) -> ModelT:
    """Replace linear layers by :class:`Linear4bit`, in place, where transformers quantises them.

    Args:
        model: a model, usually a fake one.
        skip: names (or their last parts) of modules that stay as they are; by default what
            transformers leaves: the output head, tied weights, what it keeps in float32, and the
            owner of the model's last parameter if that is a weight.
        double: ``bnb_4bit_use_double_quant``.
        compute_dtype: ``bnb_4bit_compute_dtype``.
        prepare: what PEFT's ``prepare_model_for_kbit_training`` does to parameters besides: all
            are frozen, and the 16-bit ones that are left are cast to float32.

    Raises:
        ValueError: there is nothing to quantise.
    """
    skipped = tuple(_kept(model) if skip is None else skip)
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if _is_linear(module) and not _skips(name, skipped)
    ]
    if not chosen:
        raise ValueError(
            f"no linear layer of {type(model).__name__} can be quantised to 4 bit: expected "
            f"nn.Linear or Conv1D modules besides {', '.join(skipped) or 'the model itself'}"
        )
    for name, module in chosen:
        outputs, features = linear_shape(module)
        held = module._parameters["weight"]
        assert held is not None
        weight = _new(held.detach(), (outputs, features), held.dtype)
        quantised = Linear4bit(weight, module._parameters["bias"], double, compute_dtype)
        model.set_submodule(name, quantised.train(module.training))
    if prepare:
        _prepare(model)
    return model


def _is_linear(module: nn.Module) -> bool:
    """``nn.Linear`` itself, not what is made of it, and GPT-2's ``Conv1D``."""
    return type(module) is nn.Linear or is_conv1d(module)


def _kept(model: nn.Module) -> list[str]:
    """Names of the modules that transformers does not quantise."""
    heads = {id(head) for head in output_heads(model) if head is not None}
    names = [name for name, module in model.named_modules() if id(module) in heads]
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    names += [name for sharing in owners.values() if len(sharing) > 1 for name in sharing]
    names += getattr(model, "_keep_in_fp32_modules", None) or []
    last = [name for name, _ in model.named_parameters()][-1:]
    names += [name.removesuffix(".weight") for name in last if name.endswith(".weight")]
    return sorted(set(names) - {""})


def _skips(name: str, skipped: Iterable[str]) -> bool:
    dotted = f".{name}."
    return not name or any(
        dotted.startswith(f".{skip}.") or name.endswith(skip) for skip in skipped
    )


def _prepare(model: nn.Module) -> None:
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            parameter.requires_grad_(False)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                if id(parameter) not in cast:
                    cast[id(parameter)] = nn.Parameter(parameter.detach().float(), False)
                module._parameters[name] = cast[id(parameter)]


def _new(like: Tensor, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return like.detach().new_zeros(shape, dtype=dtype or torch.float32)
