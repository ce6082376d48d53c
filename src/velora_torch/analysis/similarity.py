"""How far projection changes the similarity of two sub-tokens, and the paper's prediction of it.

Let u_i be sub-tokens of unit length and θ_i the angle between u_i and the line of the unit vector
v, so that |u_i·v| = cos θ_i. Projection replaces u_i by (u_i·v) v. What it takes from the
similarity of two sub-tokens is the part of them that is orthogonal to v:

    Δ_ij = u_i·u_j - (u_i·v)(u_j·v) = ± sin θ_i sin θ_j cos φ_ij

with φ_ij the angle between these two orthogonal parts. For a sub-token with itself, and for any
two at the same angle whose orthogonal parts are parallel, |Δ| = sin² θ. The paper (figure 2b)
predicts

    P(|Δ| >= k) = 2 (1 - Φ(√k / σ)),    Φ the standard normal distribution's function,

which is P(θ² >= k) for θ ~ N(0, σ²). So three things are assumed: angles to v are normal around
zero with spread σ, they are small (sin² θ ≈ θ²; in truth sin² θ < θ²), and the two sub-tokens lie
on one side of v at about the same angle. The last one is the worst case: |Δ_ij| <= sin θ_i sin
θ_j, and orthogonal parts that point in different directions make it smaller. The prediction
should therefore lie near the curve of single sub-tokens, and above that of pairs.

σ is the root mean square of the measured angles (in radians): the likeliest one for a normal
distribution around zero.

Shapes: T tokens, G groups, M features per sub-token, P pairs, K thresholds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(21))
"""Changes k of a similarity, from 0 to 1, at which the curves are evaluated."""
PAIRS = 4096
"""Pairs of sub-tokens that are drawn for each input and number of groups."""


def predicted(k: float, spread: float) -> float:
    """2 (1 - Φ(√k / σ)), the paper's probability that a similarity changes by at least k."""
    if k == 0:
        return 1.0
    return math.erfc(math.sqrt(k / 2) / spread) if spread else 0.0


@dataclass(frozen=True)
class Pairs:
    """Pairs of different tokens, each within one group, and how similar their sub-tokens are."""

    first_P: Tensor
    second_P: Tensor
    """Places in the T * G sub-tokens, row by row."""
    cosine_P: Tensor


def draw_pairs(x_TGM: Tensor, seed: int, count: int = PAIRS) -> Pairs:
    """Draw pairs of sub-tokens, seeded; pairs with a sub-token of zeros are left out.

    A pair lies within a group: gradients mix the sub-tokens of different tokens, but never those
    of different groups, and with vectors for each group only these share theirs.
    """
    tokens, groups, _ = x_TGM.shape
    nothing = torch.zeros(0, dtype=torch.long)
    if tokens < 2:
        return Pairs(nothing, nothing, nothing.double())
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(tokens, (count,), generator=generator)
    other = (first + torch.randint(1, tokens, (count,), generator=generator)) % tokens
    place = torch.randint(groups, (count,), generator=generator)
    flat = x_TGM.double().flatten(0, 1)
    first, other = first * groups + place, other * groups + place
    a_PM, b_PM = flat[first], flat[other]
    lengths = a_PM.norm(dim=1) * b_PM.norm(dim=1)
    exists = lengths > 0
    cosine = (a_PM * b_PM).sum(dim=1)[exists] / lengths[exists]
    return Pairs(first[exists], other[exists], cosine)


@dataclass(frozen=True)
class Change:
    """Measured and predicted change of similarities under one projection."""

    spread: float
    """σ, in radians. NaN where there is no sub-token but zeros."""
    mean: float
    """Mean |Δ| over the pairs."""
    gap: float
    """Largest distance, over the thresholds, of the pairs' curve from the predicted one."""
    pairs_K: list[float]
    """Share of the pairs with |Δ| >= k."""
    single_K: list[float]
    """Share of the sub-tokens whose similarity with themselves changes by at least k."""
    predicted_K: list[float]


def change(x_TGM: Tensor, z_TG: Tensor, pairs: Pairs) -> Change:
    """Measure the change of similarities under a projection z of the sub-tokens x."""
    length = x_TGM.double().norm(dim=2).flatten()
    exists = length > 0
    cosine = torch.where(exists, z_TG.double().flatten() / torch.where(exists, length, 1.0), 0.0)
    cosine = cosine.clamp(-1, 1)
    delta = (pairs.cosine_P - cosine[pairs.first_P] * cosine[pairs.second_P]).abs()
    single = 1 - cosine[exists].square()
    spread = float(cosine[exists].abs().arccos().square().mean().sqrt())
    curves = {
        "pairs_K": _shares(delta),
        "single_K": _shares(single),
        "predicted_K": [predicted(k, spread) for k in THRESHOLDS],
    }
    gaps = zip(curves["pairs_K"], curves["predicted_K"], strict=True)
    return Change(spread, float(delta.mean()), max(abs(a - b) for a, b in gaps), **curves)


def _shares(change_P: Tensor) -> list[float]:
    """Share of the changes that are at least k, for each threshold."""
    if not len(change_P):
        return [math.nan] * len(THRESHOLDS)
    # A change of 1 - 1e-16 is one of 1.
    limits = torch.tensor(THRESHOLDS, dtype=torch.float64) - 1e-12
    return (change_P[:, None] >= limits).double().mean(dim=0).tolist()
