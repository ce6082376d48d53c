"""How the vectors v are chosen.

Vectors are kept as ``v_GM`` (G groups, M features per sub-token), one unit row per group; with
``vectors="shared"`` all rows are the same vector. Where D is not a multiple of M, the last row is
cut to the features that exist and normalised again, so that |C| = |dW| holds for every layer.
Nothing here branches on a tensor's values: a batch that cannot give a direction (all zero, or not
finite) leaves the old vector in place, and says so in a boolean tensor that is read once per step.

Source: paper, section 3 ("fixed average") and table 6 (the other choices).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor
from torch.nn import functional as F

from velora_torch.config import Init

SVD_SAMPLE = 4096
"""Sub-tokens that ``init="svd"`` looks at."""


def feature_mask(groups: int, size: int, features: int, device: torch.device) -> Tensor:
    """True where the (G, M) position is a real feature."""
    return (torch.arange(groups * size, device=device) < features).view(groups, size)


def uniform(mask_GM: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors before any data: equal entries, unit rows (zero rows where no feature is)."""
    ones = mask_GM.to(dtype)
    return ones / ones.sum(dim=1, keepdim=True).clamp(min=1).sqrt()


def normalise(raw_GM: Tensor, mask_GM: Tensor, otherwise_GM: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of ``raw``; rows that have no direction are taken from ``otherwise``.

    Returns:
        The vectors (G, M), and a 0-d boolean: whether any row had a direction. (A group whose
        features are always zero has none in any batch, and needs none.)
    """
    raw_GM = raw_GM.to(otherwise_GM.dtype) * mask_GM
    # Divide by the largest entry first: the norm of tiny or huge rows must not under- or overflow.
    largest = raw_GM.abs().amax(dim=1, keepdim=True)
    good = (largest > 0) & torch.isfinite(largest)
    rows = raw_GM / torch.where(good, largest, 1.0)
    norm = rows.square().sum(dim=1, keepdim=True).sqrt()
    vectors = torch.where(good, rows / torch.where(good, norm, 1.0), otherwise_GM)
    return vectors, good.any()


def mean_sub_token(x_TD: Tensor, groups: int, size: int, dtype: torch.dtype) -> Tensor:
    """Mean sub-token of each group, (G, M); features that do not exist are zero."""
    mean_D = x_TD.mean(dim=0, dtype=dtype)
    return F.pad(mean_D, (0, groups * size - mean_D.shape[0])).view(groups, size)


def share(raw_GM: Tensor, mask_GM: Tensor) -> Tensor:
    """The mean over groups, once for every group; a feature counts only where it exists."""
    count_M = mask_GM.sum(dim=0).clamp(min=1)
    return (raw_GM.sum(dim=0) / count_M).expand_as(raw_GM)


def singular(x_TD: Tensor, groups: int, size: int, per_group: bool, dtype: torch.dtype) -> Tensor:
    """First right singular vector of (a sub-sample of) the sub-tokens, (G, M).

    Its sign is the one that gives the mean sub-token a positive projection.
    """
    stride = -(-x_TD.shape[0] * (1 if per_group else groups) // SVD_SAMPLE)
    rows_TD = x_TD[:: max(stride, 1)].to(dtype)
    padded = F.pad(rows_TD, (0, groups * size - rows_TD.shape[1]))
    tokens_TGM = torch.nan_to_num(padded, 0.0, 0.0, 0.0).unflatten(1, (groups, size))
    tokens_GTM = tokens_TGM.transpose(0, 1)
    if not per_group:
        tokens_GTM = tokens_GTM.reshape(1, -1, size)
    # Scaled, so that no square under- or overflows.
    largest = tokens_GTM.abs().amax(dim=(1, 2), keepdim=True)
    tokens_GTM = tokens_GTM / torch.where(largest > 0, largest, 1.0)
    gram = tokens_GTM.transpose(1, 2) @ tokens_GTM
    vectors = torch.linalg.eigh(gram).eigenvectors[:, :, -1]
    sign = torch.where((vectors * tokens_GTM.mean(dim=1)).sum(1, keepdim=True) < 0, -1.0, 1.0)
    has_rows = (tokens_GTM != 0).any(dim=2).any(dim=1, keepdim=True)
    finite = torch.isfinite(rows_TD).all()
    return torch.where(has_rows & finite, vectors * sign, 0.0).expand(groups, size)


def random(
    name: str,
    seed: int,
    draw: int,
    shape: tuple[int, int],
    per_group: bool,
    dtype: torch.dtype,
    init: Init,
) -> Tensor:
    """Seeded random directions, (G, M), the same on every rank and device.

    Args:
        name: the layer's name; layers draw independently of their order.
        seed: the configuration's seed.
        draw: how many times this layer has drawn before.
        shape: (G, M).
        per_group: a vector for each group, or one for all.
        dtype: type of the result.
        init: ``random``, Gaussian entries; ``rademacher``, entries ±1.
    """
    groups, size = shape
    generator = torch.Generator().manual_seed(layer_seed(name, seed, draw))
    rows = groups if per_group else 1
    drawn = torch.randn(rows, size, generator=generator, dtype=dtype)
    if init == "rademacher":
        drawn = torch.where(drawn < 0, -1.0, 1.0).to(dtype)
    return drawn.expand(groups, size)


def layer_seed(name: str, seed: int, counter: int) -> int:
    """A 63-bit seed from the configuration's seed, a layer's name and a counter."""
    text = f"{seed}/{name}/{counter}".encode()
    return (zlib.crc32(text) << 31) ^ zlib.crc32(text[::-1] + b"velora")


def cosine(old_GM: Tensor, new_GM: Tensor) -> Tensor:
    """Cosine between old and new vector of each group, (G,): projects a first moment.

    A dense moment m v_old, projected on v_new, is m (v_old . v_new) v_new.
    """
    return (old_GM * new_GM).sum(dim=1)


def sign_cosine(old_GM: Tensor, new_GM: Tensor) -> Tensor:
    """The same for buffers that stand for b sign(v), as RMSprop's momentum, (G,)."""
    new_sign = new_GM.sign()
    return (old_GM.sign() * new_sign).sum(dim=1) / new_sign.square().sum(dim=1).clamp(min=1)
