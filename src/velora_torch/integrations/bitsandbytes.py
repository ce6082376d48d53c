"""bitsandbytes' optimizers: what they compute, their settings, and their 8-bit states."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

BLOCK = 256
"""Numbers that share one scale in bitsandbytes' blockwise 8-bit states."""


def algorithm(optimizer: Optimizer) -> str | None:
    """What the optimizer computes (``adam``, ``lion``, ...); ``None`` for code of its own."""
    from bitsandbytes.optim.optimizer import Optimizer1State, Optimizer2State, Optimizer8bit

    kind: Any = type(optimizer)
    known = (Optimizer1State.update_step, Optimizer2State.update_step)
    own_step = inspect.unwrap(kind.step) is not inspect.unwrap(Optimizer8bit.step)
    if own_step or kind.update_step not in known:
        return None
    return getattr(optimizer, "optimizer_name", None)


def overrides(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    """Settings of one parameter that its group lacks, ``override_config`` included."""
    if not (optimizer.mng.pid2config or optimizer.mng.index2config):
        return {"max_unorm": optimizer.args.max_unorm}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, other in enumerate(group["params"]):
            if other is parameter:
                found: dict[str, Any] = optimizer.get_config(group_index, index, group)
                return found
    raise AssertionError("the parameter is not in the optimizer")


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


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers in a format that they can be differentiated in.

    On some CPUs an evaluation repacks the weights for inference for good, and training after it
    runs an operator without a gradient: inputs would get wrong gradients.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
