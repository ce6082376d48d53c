"""Quantised linear layers: coefficients on a base that stays as it is.

    y = base(x) + (x e) coefᵀ        dX = dY W + (dY coef) e        d coef = scale * dYᵀ z

Nothing can be folded into a quantised weight, so the coefficients stay pending. ``base`` is the
quantised layer's own forward, so that outputs are bitwise what they were.

What the libraries' own operators keep for the backward pass, though the weight is frozen:
bitsandbytes' 4-bit layers the packed weight alone; its 8-bit layers their whole input (not as a
saved tensor, so that no hook sees it); torchao's layers a dequantised copy of the weight. The
last two go through :class:`FrozenProduct` instead, which keeps nothing but the layer.

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F

from velora_torch.config import VeloraConfig
from velora_torch.integrations import bitsandbytes, torchao
from velora_torch.layers.base import CompressedLayer, _compute_dtype, _in_transform
from velora_torch.layers.tensor_parallel import refuse_if_split
from velora_torch.recomputation.deferred import plain
from velora_torch.subtoken.factored import _NoDoubleBackward, expand, project, project_to_save
from velora_torch.swap import Swapped, plain_class, swap

KNOWN = (
    "bitsandbytes' Linear4bit (nf4, fp4) and Linear8bitLt, and nn.Linear with weight-only "
    "quantisation by torchao"
)

_BASES_ALONE: ContextVar[bool] = ContextVar("bases_alone", default=False)


@contextmanager
def bases_alone() -> Iterator[None]:
    """``state_dict`` gives quantised bases without their pending coefficients, not an error.

    For who saves the coefficients too (``velora_torch.checkpoint.save_state``).
    """
    token = _BASES_ALONE.set(True)
    try:
        yield
    finally:
        _BASES_ALONE.reset(token)


# ------------------------------------------------------------------ which layers


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a quantised linear layer of a kind that can hold coefficients."""
    return bitsandbytes.linear_bits(module) is not None or torchao.is_torchao(module)


def looks_quantised(module: nn.Module) -> bool:
    """Whether a module looks like a quantised linear layer of any library.

    It has features going in and out, and a matrix of codes instead of a floating-point weight.
    """
    if not all(hasattr(module, name) for name in ("in_features", "out_features")):
        return False
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_floating_point():
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(t.dim() >= 2 and not (t.is_floating_point() or t.is_complex()) for t in own)


def unquantisable(module: nn.Module) -> str | None:
    """Why a layer that is or looks quantised cannot hold coefficients; ``None`` if it can."""
    kind = plain_class(module).__name__
    if not is_quantised(module):
        return f"{kind} is a quantised layer of a kind that is not known; known are {KNOWN}"
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    if torchao.is_torchao(module):
        if type(module).forward is not nn.Linear.forward and not isinstance(module, Swapped):
            return f"{kind} brings a forward of its own"
        return torchao.why_not(module)
    if not isinstance(module, Swapped) and bitsandbytes.has_own_forward(module):
        return f"{kind} brings a forward of its own"
    if not bitsandbytes.is_quantised(module):
        return f"{kind} has not quantised its weight yet: move the model to its device first"
    return None


def dequantise(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) that a quantised layer computes with, in ``dtype``: a copy."""
    if torchao.is_torchao(module):
        return torchao.dequantise(module, dtype)
    return bitsandbytes.dequantise(module, dtype)


def keeps_too_much(module: nn.Module) -> bool:
    """Whether the layer's own operator keeps its input, or an unpacked copy of its weight."""
    return bitsandbytes.linear_bits(module) == 8 or torchao.is_torchao(module)


# ------------------------------------------------------------------ the operators


class FrozenProduct(Function):
    """``y = base(x)`` of a frozen quantised layer; keeps neither x nor an unpacked weight.

    dX = dY W with the weight dequantised in the backward pass, db = sum of dY.
    """

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:
        """The layer's own forward."""
        y: Tensor = plain_forward(layer, x)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save nothing; the layer keeps its weight anyway."""
        x, bias, ctx.layer = inputs
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and bias."""
        (dY,) = grad_outputs
        dX = db = None
        if ctx.needs_input_grad[0]:
            weight_OD = dequantise(ctx.layer, dY.dtype)
            dX = (dY @ weight_OD).view(ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            db = dY.reshape(-1, dY.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dX, db, None


class AddCoefficients(Function):
    """``y + (x e) coefᵀ``, keeping z (T x G) and neither x nor y.

    Gradients: dy = dY, dX = (dY coef) e, d coef = scale * dYᵀ z. The caller computes z = x v, and
    p = x e while coefficients are pending (the same tensor if e is v). Without p nothing is added,
    and y is handed on as it is.
    """

    @staticmethod
    def forward(
        y: Tensor,
        x: Tensor,
        coef: Tensor,
        z: Tensor | None,
        p: Tensor | None,
        e: Tensor | None,
        scale: float,
        name: str,
    ) -> Tensor:
        """Compute the sum."""
        if p is not None:
            y = y + F.linear(p, coef.to(p.dtype)).view(y.shape).to(y.dtype)
        # Not a view for autograd, which forbids in-place operators on views made in a Function.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what the backward pass needs: never x."""
        _y, x, coef, z, _p, e, ctx.scale, ctx.name = inputs
        ctx.save_for_backward(z, coef, e)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, x and coef."""
        (dY,) = grad_outputs
        z, coef, e = ctx.saved_tensors
        with torch.no_grad():
            dX, dC = _gradients(ctx, dY.reshape(-1, dY.shape[-1]), z, coef, e)
        if torch.is_grad_enabled() and dC is not None:  # create_graph=True
            dC = _NoDoubleBackward.apply(dC, dY, coef)
        return dY, dX, dC, None, None, None, None, None


def _gradients(
    ctx: Any, dY_TO: Tensor, z: Tensor | None, coef: Tensor, e: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    dX = None
    if e is not None and ctx.needs_input_grad[1]:
        dX = expand(dY_TO @ coef.to(dY_TO.dtype), e.to(dY_TO.dtype), ctx.x_shape[-1])
        dX = dX.view(ctx.x_shape).to(ctx.x_dtype)
    if z is None:
        warnings.warn(
            f"VeLoRA: layer {ctx.name!r} is in evaluation mode and has no vectors yet, so its "
            f"coefficients get no gradient. Call model.train() for the steps that should train "
            f"them.",
            stacklevel=2,
        )
        return dX, None
    return dX, (dY_TO.t() @ z.to(dY_TO.dtype)).to(coef.dtype) * ctx.scale


def plain_forward(layer: nn.Module, x: Tensor) -> Any:
    """What the layer computes without us."""
    kind: Any = getattr(type(layer), "plain_class", type(layer))
    return kind.forward(layer, x)


def base_product(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's own output, differentiable, without keeping x or an unpacked weight."""
    bias = layer._parameters["bias"]
    differentiable = x.requires_grad or (bias is not None and bias.requires_grad)
    compiling = torch.compiler.is_compiling()
    if not keeps_too_much(layer) or compiling or not (torch.is_grad_enabled() and differentiable):
        y: Tensor = plain_forward(layer, x)
        return y
    return FrozenProduct.apply(x, bias, layer)


# ------------------------------------------------------------------ the layers


class CompressedQuantized(CompressedLayer):
    """A quantised linear layer with coefficients beside it, which are always pending."""

    transposed = False
    foldable = False
    in_features: int
    out_features: int

    def start(self, name: str, groups: int, size: int, config: VeloraConfig) -> None:
        """Turn from a plain quantised layer into a compressed one."""
        bitsandbytes.keep_differentiable(self)
        super().start(name, groups, size, config)

    def _load_from_state_dict(self, *args: Any) -> None:
        bitsandbytes.prepare_to_load(self)
        super()._load_from_state_dict(*args)

    @property
    def weight_OD(self) -> Tensor:
        """The weight that the base computes with, (O, D) in float32: a copy."""
        return dequantise(self, torch.float32)

    @property
    def outputs(self) -> int:
        """O."""
        return self.out_features

    @property
    def features(self) -> int:
        """D."""
        return self.in_features

    @property
    def weight(self) -> Tensor:
        """The quantised weight of the base, as its library stores it."""
        return self.raw_weight

    def forward(self, x: Tensor) -> Tensor:
        """``y = base(x) + (x e) coefᵀ``, keeping z = x v (T x G) for the backward pass."""
        x = plain(x)
        refuse_if_split(self, x)
        state, coef = self.velora, self.coef
        substituted = self._substituted()
        functional = substituted or _in_transform()
        if functional:
            self._check_functional()
        if not (substituted or torch.compiler.is_compiling()):
            self.settle()
        trains = torch.is_grad_enabled() and coef.requires_grad
        if trains and state.due and self.training and x.numel() > 0 and not functional:
            self.draw(x)
        y = base_product(self, x)
        e = self.direction_GM if state.pending or substituted else None
        if not trains:
            if e is None:
                return y
            pending = F.linear(project(x, e, self.shared), coef.to(x.dtype))
            return y + pending.view(y.shape).to(y.dtype)
        z = p = None
        with torch.no_grad():
            if e is not None:
                p = project(x, e, self.shared)
            if state.drawn or x.numel() == 0:
                dtype = _compute_dtype(x)
                if p is not None and state.direction == "v":
                    z = p = p.to(dtype)
                else:
                    z = project_to_save(x, self.velora_vectors, self.shared, dtype)
        return AddCoefficients.apply(y, x, coef, z, p, e, state.config.scale, state.name)

    @torch.no_grad()
    def fold(self, decay: float | Tensor = 1.0) -> None:
        """Refuse: there is nothing to fold into.

        Raises:
            ValueError: always.
        """
        raise ValueError(self.why_not_folded())

    def why_not_folded(self) -> str:
        """What to do instead of folding."""
        return (
            f"VeLoRA: layer {self.velora.name!r} has pending coefficients on a quantised weight, "
            f"into which nothing can be folded. Save them with velora_torch.export_lora(model, "
            f"path): PEFT loads that adapter on the quantised model, or merges it into an "
            f"unquantised one. velora_torch.restore(model, drop_pending=True) throws them away"
        )

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight with pending coefficients in it, (O, D) in float32: a copy."""
        return self.weight_OD + expand(self.coef.detach(), self.direction_GM, self.features)

    def _save_pending(self, destination: Any, prefix: str) -> None:
        if not _BASES_ALONE.get():
            raise ValueError(
                f"VeLoRA: state_dict() and save_pretrained() cannot hold the pending coefficients "
                f"of layer {self.velora.name!r}, whose weight is quantised. Save them with "
                f"velora_torch.export_lora(model, path), or for resuming with "
                f"velora_torch.checkpoint.save_state(model, folder)"
            )


class LeanBase(Swapped):
    """A frozen quantised layer that keeps neither its input nor an unpacked weight."""

    kind = "quantised base"

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output."""
        return base_product(self, plain(x))


def make_lean(model: nn.Module) -> None:
    """Give quantised layers whose own operators keep too much our backward pass.

    Adapters on top of them would free nothing otherwise. ``undo_recompute`` takes it back.
    """
    for module in model.modules():
        if isinstance(module, (CompressedLayer, Swapped)) or not is_quantised(module):
            continue
        weight = module._parameters["weight"]
        trains = weight is not None and weight.requires_grad
        if not trains and keeps_too_much(module) and unquantisable(module) is None:
            swap(module, LeanBase)
