"""The paper's equations, slow and obvious: the ground truth that every fast path is tested on.

Source: "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", arXiv 2405.17991,
equations 1 and 2 and Algorithm 1.

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features;
D <= G * M, missing features count as zero. ``v_GM`` holds one unit vector per group (all rows
are the same vector when it is shared).
"""

from __future__ import annotations

import torch
from torch import Tensor


def group(x_TD: Tensor, num_groups: int, size: int) -> Tensor:
    """Divide every token into ``num_groups`` sub-tokens of ``size`` features: (T, G, M)."""
    tokens, features = x_TD.shape
    padded = x_TD.new_zeros(tokens, num_groups * size)
    padded[:, :features] = x_TD
    return padded.reshape(tokens, num_groups, size)


def compress(x_TD: Tensor, v_GM: Tensor) -> Tensor:
    """Equation 1: z[t, g] = sum over m of x[t, g, m] * v[g, m]. Returns (T, G)."""
    x_TGM = group(x_TD, *v_GM.shape)
    return (x_TGM * v_GM).sum(dim=-1)


def reconstruct(z_TG: Tensor, v_GM: Tensor, features: int) -> Tensor:
    """Equation 2: x_hat[t, g, m] = z[t, g] * v[g, m]. Returns (T, D)."""
    x_TGM = z_TG[:, :, None] * v_GM
    return x_TGM.reshape(z_TG.shape[0], v_GM.numel())[:, :features]


def linear_gradients(
    x: Tensor, weight_OD: Tensor, grad_output: Tensor, v_GM: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1, backward pass of ``y = x @ weight.T + bias``.

    Args:
        x: input, (..., D).
        weight_OD: weight, (O, D).
        grad_output: gradient of the loss with respect to y, (..., O).
        v_GM: unit vectors, (G, M).
        scale: factor on the weight gradient.

    Returns:
        Gradients of x and of the bias (exact), and of the weight (from the rebuilt input): x,
        weight, bias.
    """
    features = weight_OD.shape[1]
    dY_TO = grad_output.reshape(-1, weight_OD.shape[0])
    x_TD = x.reshape(-1, features)
    x_hat_TD = reconstruct(compress(x_TD, v_GM), v_GM, features)
    dX = torch.matmul(dY_TO, weight_OD).reshape(x.shape)
    dW_OD = scale * torch.matmul(dY_TO.T, x_hat_TD)
    return dX, dW_OD, dY_TO.sum(dim=0)


def expand(coef_OG: Tensor, e_GM: Tensor, features: int) -> Tensor:
    """The weight change that coefficients stand for: delta[o, g, m] = coef[o, g] * e[g, m]."""
    return reconstruct(coef_OG, e_GM, features)


def scale_shift_gradients(
    x: Tensor, gamma_D: Tensor, grad_output: Tensor, v_GM: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The same idea for ``y = gamma * x + beta``: the plain gradient, from the rebuilt input.

    Args:
        x: input, (..., D).
        gamma_D: scale of each feature, (D,).
        grad_output: gradient of the loss with respect to y, (..., D).
        v_GM: unit vectors, (G, M).
        scale: factor on the gradient of gamma.

    Returns:
        Gradients of x and of the shift beta (exact), and of gamma: x, gamma, beta.
    """
    features = gamma_D.shape[0]
    dY_TD = grad_output.reshape(-1, features)
    x_hat_TD = reconstruct(compress(x.reshape(-1, features), v_GM), v_GM, features)
    dgamma_D = scale * (dY_TD * x_hat_TD).sum(dim=0)
    return grad_output * gamma_D, dgamma_D, dY_TD.sum(dim=0)
