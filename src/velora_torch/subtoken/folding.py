"""Folding coefficients into a weight: W <- decay * W + coef (x) e.

With PyTorch's operators chunk by chunk, or, where `kernels.fold` can, in one pass over W.

Shapes: O output features, D input features, G groups, M features per sub-token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from velora_torch.sharding import Block
from velora_torch.subtoken.factored import expand
from velora_torch.subtoken.kernels.fold import fold_native_

CHUNK = {"cpu": 1 << 19}
"""Weights handled at a time, so that the temporary stays in cache (CPU) or small (GPU)."""
DEFAULT_CHUNK = 1 << 24


def fold_(
    weight_OD: Tensor,
    coef_OG: Tensor,
    e_GM: Tensor,
    decay: float | Tensor = 1.0,
    stochastic_seed: int | None = None,
    block: Block | None = None,
) -> None:
    """Add ``coef[o, g] * e[g, m]`` to ``decay * weight`` in place.

    Args:
        weight_OD: the weight, or a transposed view of it; changed in place.
        coef_OG: coefficients, in float32 or wider.
        e_GM: v for optimizers that are linear in the gradient, sign(v) for scale-invariant ones.
        decay: 1 - lr * weight_decay of this step.
        stochastic_seed: seed of the rounding of 16-bit weights; ``None`` rounds to nearest.
        block: where the weight lies in the whole one, of which ``coef`` has the same rows and
            ``e`` all groups; rounding is that of the whole weight.
    """
    outputs, features = weight_OD.shape
    if weight_OD.numel() == 0:
        return
    block = block or Block(0, 0, outputs, features)
    e_GM = e_GM.to(coef_OG.dtype)
    decays = isinstance(decay, Tensor) or decay != 1.0
    half = weight_OD.dtype in (torch.bfloat16, torch.float16)
    noise = None
    if half and stochastic_seed is not None:
        noise = _Noise(block, weight_OD.shape, stochastic_seed, weight_OD.device)
    if not torch.compiler.is_compiling() and block.column == 0:
        numbers = None if noise is None else (noise.a_O, noise.b_D)
        if fold_native_(weight_OD, coef_OG, e_GM, decay, numbers):
            return
    if noise is not None and weight_OD.device.type == "cpu":  # see _round_stochastically_
        coef_OG, e_GM = _one_nan(coef_OG), _one_nan(e_GM)
        decay = _one_nan(decay) if isinstance(decay, Tensor) else decay
    rows = max(1, CHUNK.get(weight_OD.device.type, DEFAULT_CHUNK) // features)
    for start in range(0, outputs, rows):
        part = weight_OD[start : start + rows]
        wide = part.to(coef_OG.dtype) if half else part
        if decays:
            wide.mul_(decay)
        _add_product_(wide, coef_OG[start : start + rows], e_GM, block.column)
        if not half:
            continue
        if noise is not None:
            _round_stochastically_(wide, noise.rows(start, rows), weight_OD.dtype)
        part.copy_(wide)


def _add_product_(weight_OD: Tensor, coef_OG: Tensor, e_GM: Tensor, column: int) -> None:
    """``weight[o, g M + m - column] += coef[o, g] * e[g, m]``, in one pass where all is whole."""
    features = weight_OD.shape[1]
    if features == e_GM.numel() and weight_OD.is_contiguous():
        weight_OD.unflatten(1, e_GM.shape).addcmul_(coef_OG.unsqueeze(-1), e_GM)
    else:
        weight_OD.add_(expand(coef_OG, e_GM, column + features)[:, column:])


def _one_nan(x: Tensor) -> Tensor:
    """The same with one bit pattern for all NaN, whose low half noise can be added to."""
    return x.nan_to_num(float("nan"), float("inf"), float("-inf"))


class _Noise:
    """Uniform 16-bit integers a[o] xor b[d], from O + D random numbers instead of O * D.

    Each entry is uniform and any two are independent, which is all that unbiased rounding with
    uncorrelated errors asks for.
    """

    def __init__(self, block: Block, shape: torch.Size, seed: int, device: torch.device) -> None:
        generator, whole = torch.Generator(device).manual_seed(seed), (block.rows, block.columns)
        numbers = torch.randint(
            0, 1 << 16, (sum(whole),), generator=generator, device=device, dtype=torch.int32
        )
        a_O, b_D = numbers.split(whole)
        self.a_O = a_O[block.row : block.row + shape[0]]
        self.b_D = b_D[block.column : block.column + shape[1]]

    def rows(self, start: int, count: int) -> Tensor:
        """Noise of ``count`` rows from ``start``, int32 in [0, 2^16)."""
        return self.a_O[start : start + count, None] ^ self.b_D


def _round_stochastically_(wide: Tensor, noise: Tensor, dtype: torch.dtype) -> None:
    """Round float32 to values that ``dtype`` holds exactly, up or down with unbiased odds.

    Values that ``dtype`` holds, infinities and NaN stay what they are.
    """
    if dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32: add noise below the cut, then cut. NaN must not
        # have all bits set, or the sum carries. GPUs compute such ones; a CPU only passes on those
        # of its operands, and fold_ has replaced them there, where they are fewer.
        if wide.device.type != "cpu":
            wide.nan_to_num_(float("nan"), float("inf"), float("-inf"))
        wide.view(torch.int32).add_(noise).bitwise_and_(-0x10000)
        return
    info = torch.finfo(dtype)
    # Distance of neighbours at each value: its power of two (the sign and fraction bits cut) * eps.
    power = wide.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    step = power.mul_(info.eps).clamp_(min=info.tiny * info.eps)
    steps = wide / step  # exact: a power of two
    below = steps.floor()
    up = (steps - below) * (1 << 16) > noise + 0.5
    wide.copy_(torch.where(torch.isfinite(wide), (below + up) * step, wide))
