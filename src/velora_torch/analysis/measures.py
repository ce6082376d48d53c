"""What compression keeps of a layer's input and of its weight's gradient, as numbers.

Everything here is a function of matrices and computes in float64. The rebuilt input x_hat and the
compressed gradient are never built: with unit vectors v_g the compressed gradient is

    dW_hat[o, g, m] = C[o, g] * v[g, m],    C = dYᵀ z,    z[t, g] = sum over m of x[t, g, m] v[g, m]

and C[o, g] is also the inner product of the exact dW[o, g, :] with v_g. So dW_hat is dW, each
group projected on its vector; hence <dW, dW_hat> = |dW_hat|² = |C|², and

    cosine = |C| / |dW|,    |dW - dW_hat|² = |dW|² - |C|²,    relative error² = 1 - cosine².

Shapes: T tokens, D input features, G groups, M features per sub-token (D <= G * M, missing
features are zero), O output features, N rows of any matrix. ``v_GM`` holds a unit row for each
group; they are all the same when one vector is shared.

Sources: paper, equations 1 and 2, Algorithm 1, figure 2a and 2c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from velora_torch.subtoken.reference import group

NEGLIGIBLE = 1e-2
"""An entry of a gradient counts as vanished below this share of the exact gradient's root mean
square; a sub-token as zeroed, when the projection keeps less than this share of its energy."""


def stable_rank(a_NM: Tensor) -> float:
    """‖A‖_F² / ‖A‖_2²: between 1 (rank one) and min(N, M) (all singular values are equal).

    Paper, figure 2a, with the matrix of all sub-tokens of a batch, (T * G, M). Its inverse is the
    energy that the best shared vector keeps, the first right singular vector. Of z, (T, G), it says
    how many directions of the input the kept numbers tell apart: 1 if all groups say the same.

    Returns:
        NaN where it is not defined: for a matrix of zeros, or one that is not finite.
    """
    return float(_stable_ranks(a_NM[None])[0])


def _stable_ranks(a_BNM: Tensor) -> Tensor:
    """The stable rank of each matrix of a batch, (B,)."""
    a_BNM = a_BNM.double()
    largest = a_BNM.abs().amax(dim=(1, 2), keepdim=True)
    defined = (largest > 0) & torch.isfinite(largest)
    # Scaled, so that no square under- or overflows.
    a_BNM = torch.where(defined, a_BNM / torch.where(defined, largest, 1.0), 0.0)
    wide = a_BNM.shape[1] < a_BNM.shape[2]
    left, right = (a_BNM, a_BNM.mT) if wide else (a_BNM.mT, a_BNM)
    gram = left @ right
    trace_B = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    ranks_B = trace_B / torch.linalg.eigvalsh(gram)[:, -1]
    return torch.where(defined.flatten(), ranks_B, math.nan)


@dataclass(frozen=True)
class StableRanks:
    """Stable rank of one input, cut into sub-tokens."""

    shared: float
    """Of all sub-tokens of all groups together, (T * G, M): the paper's, for a shared vector."""
    per_group: float
    """Mean over groups of that of the group's own sub-tokens, (T, M)."""


def stable_ranks(x_TGM: Tensor) -> StableRanks:
    """Both stable ranks of a grouped input; groups of zeros have none and are left out."""
    by_group = _stable_ranks(x_TGM.transpose(0, 1))
    return StableRanks(stable_rank(x_TGM.flatten(0, 1)), float(by_group.nanmean()))


def grouped(x_TD: Tensor, groups: int, size: int) -> Tensor:
    """The input in float64, cut into sub-tokens, (T, G, M)."""
    return group(x_TD.double(), groups, size)


def project(x_TGM: Tensor, v_GM: Tensor) -> Tensor:
    """Equation 1: z[t, g] = sum over m of x[t, g, m] * v[g, m]. Returns (T, G)."""
    return torch.einsum("tgm,gm->tg", x_TGM.double(), v_GM.double())


@dataclass(frozen=True)
class Energy:
    """What the projection keeps of the input's squared length."""

    kept: float
    """sum of (x·v)² over sum of ‖x‖², over all sub-tokens."""
    by_group_G: Tensor
    """The same for each group alone; NaN for a group of zeros."""
    zeroed: float
    """Share of the sub-tokens, those of zeros left out, that keep less than `NEGLIGIBLE`."""


def energy(x_TGM: Tensor, z_TG: Tensor) -> Energy:
    """Energy that a projection z keeps of the sub-tokens x."""
    before_TG = x_TGM.double().square().sum(dim=2)
    after_TG = z_TG.double().square()
    exists = before_TG > 0
    zeroed = (after_TG < NEGLIGIBLE * before_TG)[exists].double().mean()
    return Energy(
        kept=float(after_TG.sum() / before_TG.sum()),
        by_group_G=after_TG.sum(dim=0) / before_TG.sum(dim=0),
        zeroed=float(zeroed),
    )


@dataclass(frozen=True)
class ExactGradient:
    """The exact gradient of a layer's weight, summed up in a few numbers."""

    norm: float
    """‖dW‖_F."""
    entries: int
    """O * D."""
    sparsity: float
    """Share of its entries below `negligible`. NaN for a zero gradient."""

    @property
    def negligible(self) -> float:
        """The size below which an entry counts as vanished."""
        return NEGLIGIBLE * self.norm / math.sqrt(self.entries)


def exact_gradient(dY_TO: Tensor, x_TD: Tensor) -> ExactGradient:
    """dW = dYᵀ x of a linear layer: its norm and how many of its entries nearly vanish."""
    dW_OD = dY_TO.double().T @ x_TD.double()
    norm, entries = float(dW_OD.norm()), dW_OD.numel()
    below = dW_OD.abs() < NEGLIGIBLE * norm / math.sqrt(entries)
    return ExactGradient(norm, entries, float(below.double().mean()) if norm else math.nan)


@dataclass(frozen=True)
class Kept:
    """A compressed gradient next to the exact one."""

    cosine: float
    """Between the two, as vectors of O * D numbers; not negative. NaN for a zero gradient."""
    relative_error: float
    """‖dW - dW_hat‖ / ‖dW‖, for scale 1: the share of the gradient that vanishes, as a length."""
    sparsity: float
    """Share of the O * D entries of the compressed gradient that nearly vanish, measured on the
    same scale as `ExactGradient.sparsity`. NaN for a zero gradient."""


def gradient_kept(exact: ExactGradient, dY_TO: Tensor, z_TG: Tensor, v_GM: Tensor) -> Kept:
    """Compare the compressed gradient C ⊗ v with the exact one, without building it.

    Args:
        exact: of the same tokens.
        dY_TO: gradient of the layer's output.
        z_TG: projected input.
        v_GM: unit vectors, zero where no feature is.
    """
    C_OG = dY_TO.double().T @ z_TG.double()
    if exact.norm == 0:
        return Kept(math.nan, math.nan, math.nan)
    cosine = float(C_OG.norm()) / exact.norm
    if cosine < 1e-12:  # nothing but rounding: v is orthogonal to the gradient
        cosine = 0.0
    cosine = min(cosine, 1.0)
    return Kept(
        cosine=cosine,
        relative_error=math.sqrt(1 - cosine**2),
        sparsity=_sparsity(C_OG, v_GM.double(), exact),
    )


def _sparsity(C_OG: Tensor, v_GM: Tensor, exact: ExactGradient) -> float:
    """Share of |C[o, g] v[g, m]| below `exact.negligible`, by one sort for each group."""
    sorted_GO = C_OG.abs().T.contiguous().sort(dim=1).values
    limits_GM = (exact.negligible / v_GM.abs()).contiguous()  # infinite where v is zero
    below = int(torch.searchsorted(sorted_GO, limits_GM).sum())
    missing = C_OG.shape[0] * v_GM.numel() - exact.entries  # features that pad the last group
    return (below - missing) / exact.entries
