"""Reconstruct, then multiply: a compressed linear layer as it is published, to be compared with.

Follows Algorithm 1 of the paper (arXiv 2405.17991) and PEFT's implementation of it line by line,
without the factor: keep z, rebuild x̂ in the backward pass, and multiply it as the plain layer
does its input.

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from velora_torch.config import VeloraConfig
from velora_torch.layers.linear import is_linear
from velora_torch.selection import select


def group(x: Tensor, groups: int) -> Tensor:
    """Sub-tokens of x (..., D), padded with zeros to G * M features: (T, G, M)."""
    features = x.shape[-1]
    size = -(-features // groups)
    if groups * size != features:
        x = F.pad(x, (0, groups * size - features))
    return x.reshape(-1, groups, size)


class ReconstructThenMultiply(Function):
    """``y = x Wᵀ + b``; dX and db are exact, dW = dYᵀ x̂ with x̂ = z v (paper, Algorithm 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, v_M: Tensor) -> Tensor:
        """Compute y from x (..., D), and keep z (T x G) for the backward pass instead of x."""
        groups = -(-x.shape[-1] // v_M.shape[0])
        z_TG = torch.einsum("tgm,m->tg", group(x, groups), v_M.to(x.dtype))  # equation 1
        ctx.save_for_backward(z_TG, weight, v_M)
        ctx.x_shape = x.shape
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the weight and of the bias."""
        z_TG, weight_OD, v_M = ctx.saved_tensors
        dY_TO = grad_outputs[0].reshape(-1, weight_OD.shape[0])
        dX = dW_OD = db_O = None
        if ctx.needs_input_grad[0]:
            dX = (dY_TO @ weight_OD).reshape(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            x_TGM = z_TG.unsqueeze(-1) * v_M.to(z_TG.dtype)  # equation 2
            x_TD = x_TGM.reshape(z_TG.shape[0], -1)[:, : weight_OD.shape[1]]
            dW_OD = dY_TO.t() @ x_TD
        if ctx.needs_input_grad[2]:
            db_O = dY_TO.sum(0)
        return dX, dW_OD, db_O, None


class ReconstructLinear(nn.Linear):
    """A linear layer whose class has been changed; v is the first batch's mean sub-token."""

    groups: int
    v_M: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``y = x Wᵀ + b``; exact without gradients."""
        if not (self.training and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)
        if self.v_M is None:
            mean_M = group(x.detach(), self.groups).mean((0, 1)).float()
            self.v_M = F.normalize(mean_M, dim=0).to(self.weight.dtype)
        y: Tensor = ReconstructThenMultiply.apply(x, self.weight, self.bias, self.v_M)
        return y


def reconstruct_then_multiply(model: nn.Module, groups: int) -> nn.Module:
    """Change the linear layers that :func:`velora_torch.compress` would compress, in place."""
    for chosen in select(model, VeloraConfig(num_groups=groups)).chosen:
        layer = chosen.module
        assert is_linear(layer), chosen.name
        layer.__class__ = ReconstructLinear
        assert isinstance(layer, ReconstructLinear)
        layer.groups, layer.v_M = groups, None
    return model
