"""8-bit optimizer states of bitsandbytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

BLOCK = 256
"""Numbers that share one scale in bitsandbytes' blockwise 8-bit states."""


def scale_quantised_(state: dict[str, Any], name: str, factor_G: Tensor) -> None:
    """Multiply the columns of a blockwise 8-bit state (O x G) by ``factor`` and quantise again."""
    from bitsandbytes import functional as F

    quantised = state[name]
    number = name.removeprefix("state")
    code, scales = state[f"qmap{number}"], state[f"absmax{number}"]
    values = F.dequantize_blockwise(quantised, absmax=scales, code=code, blocksize=BLOCK)
    values = (values.view(quantised.shape) * factor_G.to(values.dtype)).contiguous()
    again, quant_state = F.quantize_blockwise(values, code=code, blocksize=BLOCK)
    quantised.copy_(again.view_as(quantised))
    scales.copy_(quant_state.absmax)
