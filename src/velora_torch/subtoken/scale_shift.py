"""The fast path of a scale and shift: the gradient of the scale from z, without the input.

    y[t, d] = gamma[d] x[t, d] + beta[d]
    dgamma[g, m] = sum_t dY[t, g, m] z[t, g] v[g, m]

The rebuilt input z v never exists. The reference is :func:`reference.scale_shift_gradients`.

Shapes: T tokens, D features, G groups, M features per sub-token.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from velora_torch.subtoken.factored import _NoDoubleBackward


def apply_scale_shift(x: Tensor, gamma_D: Tensor, beta_D: Tensor | None, dim: int) -> Tensor:
    """``gamma * x + beta`` along one dimension of x, in the type of x.

    Args:
        x: D numbers in dimension ``dim``.
        gamma_D: (D,).
        beta_D: (D,), or ``None`` for no shift.
        dim: index of the dimension, from either end.
    """
    shape = [1] * x.dim()
    shape[dim] = -1
    gamma = gamma_D.to(x.dtype).view(shape)
    if beta_D is None:
        return x * gamma
    return torch.addcmul(beta_D.to(x.dtype).view(shape), x, gamma)


def scale_gradient(dY_TD: Tensor, z_TG: Tensor, v_GM: Tensor) -> Tensor:
    """dgamma[g, m] = sum over t of dY[t, g, m] z[t, g] v[g, m], without a copy of dY.

    Args:
        dY_TD: (T, D), D <= G * M.
        z_TG: (T, G), in the type of dY.
        v_GM: (G, M), in float32 or wider; the result has its type.

    Returns:
        (D,).
    """
    features = dY_TD.shape[1]
    groups, size = v_GM.shape
    full = features // size
    sums_GM = v_GM.new_zeros(groups, size)
    if full:
        whole = dY_TD[:, : full * size].unflatten(1, (full, size))
        sums_GM[:full] = torch.einsum("tgm,tg->gm", whole, z_TG[:, :full])
    rest = features - full * size
    if rest:
        sums_GM[full, :rest] = z_TG[:, full] @ dY_TD[:, full * size :]
    return (sums_GM * v_GM).flatten()[:features]


class CompressedScaleShift(Function):
    """``y = gamma x + beta`` that saves z (T x G), v and gamma, and nothing of the size of x.

    Gradients: dX = dY gamma and dbeta = sum of dY exactly, dgamma = scale * sum of dY z v. ``z`` is
    computed by the caller; ``None`` means that the layer has no vectors yet (evaluation before
    training), and the backward pass warns that the scale gets no gradient.
    """

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        z: Tensor | None,
        v: Tensor,
        scale: float,
        dim: int,
        name: str,
    ) -> Tensor:
        """Compute y."""
        return apply_scale_shift(x, gamma, beta, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what the backward pass needs: never x."""
        _x, gamma, beta, z, v, scale, dim, name = inputs
        ctx.save_for_backward(gamma, z, v)
        ctx.beta_dtype = None if beta is None else beta.dtype
        ctx.scale, ctx.dim, ctx.name = scale, dim, name

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gamma and beta."""
        (grad_output,) = grad_outputs
        with torch.no_grad():
            grads = _gradients(ctx, grad_output)
        if torch.is_grad_enabled():  # create_graph=True
            gamma = ctx.saved_tensors[0]
            grads = tuple(
                g if g is None else _NoDoubleBackward.apply(g, grad_output, gamma) for g in grads
            )
        return (*grads, None, None, None, None, None)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    gamma, z, v = ctx.saved_tensors
    needs_x, needs_gamma, needs_beta = ctx.needs_input_grad[:3]
    dX = dgamma = dbeta = None
    if needs_x:
        dX = apply_scale_shift(grad_output, gamma, None, ctx.dim)
    dY_TD = grad_output.movedim(ctx.dim, -1).reshape(-1, gamma.shape[0])
    if needs_beta:
        dbeta = dY_TD.sum(0, dtype=torch.promote_types(dY_TD.dtype, ctx.beta_dtype))
        dbeta = dbeta.to(ctx.beta_dtype)
    if needs_gamma and z is None:
        warnings.warn(
            f"VeLoRA: layer {ctx.name!r} is in evaluation mode and has no vectors yet, so its "
            f"scale gets no gradient. Call model.train() for the steps that should train it.",
            stacklevel=2,
        )
    elif needs_gamma:
        dgamma = scale_gradient(dY_TD, z.to(dY_TD.dtype), v * ctx.scale).to(gamma.dtype)
    return dX, dgamma, dbeta
