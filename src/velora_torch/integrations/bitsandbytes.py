"""bitsandbytes' optimizers (what they compute, their settings and 8-bit states) and layers."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
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


def take_overrides(optimizer: Optimizer, model: nn.Module) -> None:
    """Give an optimizer the settings of its model's parameters to keep, which others then lack.

    Transformers asks bitsandbytes for 32-bit states of embeddings. One manager in the process has
    them for good, the embeddings with them, and then goes by a parameter's place in the groups:
    when another model is trained, what has the place of an embedding there gets 32 bits too.
    """
    loaded: Any = sys.modules.get("bitsandbytes.optim")
    if loaded is None or not isinstance(optimizer, loaded.optimizer.Optimizer8bit):
        return
    shared = loaded.GlobalOptimManager.get_instance()
    if optimizer.mng is not shared:
        return
    own = loaded.GlobalOptimManager.__new__(loaded.GlobalOptimManager)
    own.initialize()
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own.pid2config = {key: value for key, value in shared.pid2config.items() if key in known}
    modules, asked = set(model.modules()), shared.module_weight_config_triple
    own.module_weight_config_triple = [one for one in asked if one[0] in modules]
    shared.module_weight_config_triple = [one for one in asked if one[0] not in modules]
    optimizer.mng = own


def clip_nothing(optimizer: Any) -> None:
    """Let an 8-bit optimizer neither clip updates nor skip zeros.

    galore_torch gives what were percentile clipping and blocks by place, where bitsandbytes has
    these two from 0.50 on: weights that begin as zeros would stay so.
    """
    loaded: Any = sys.modules.get("bitsandbytes.optim")
    if loaded is not None and isinstance(optimizer, loaded.optimizer.Optimizer8bit):
        optimizer.args.max_unorm, optimizer.args.skip_zeros = 0.0, False


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


# ------------------------------------------------------------------ quantised layers


def linear_bits(module: nn.Module) -> int | None:
    """4 or 8 for bitsandbytes' quantised linear layers; does not import bitsandbytes.

    ``Linear8bitLt`` with ``has_fp16_weights`` keeps a trainable 16-bit weight and is not one.
    """
    loaded = sys.modules.get("bitsandbytes.nn")
    if loaded is None or not isinstance(module, nn.Linear):
        return None
    if isinstance(module, loaded.Linear4bit):
        return 4
    if isinstance(module, loaded.Linear8bitLt) and not module.state.has_fp16_weights:
        return 8
    return None


def is_quantised(module: Any) -> bool:
    """Whether the weight has been quantised yet, which happens on its way to a device."""
    if linear_bits(module) == 4:
        return getattr(module._parameters["weight"], "quant_state", None) is not None
    return bool(module._parameters["weight"].dtype == torch.int8)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a subclass replaces the forward of the quantised layer that it derives from."""
    loaded: Any = sys.modules["bitsandbytes.nn"]
    parent = loaded.Linear4bit if isinstance(module, loaded.Linear4bit) else loaded.Linear8bitLt
    return bool(type(module).forward is not parent.forward)


def dequantise(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) that a quantised layer computes with, bit for bit, in ``dtype``."""
    weight = module._parameters["weight"]
    if linear_bits(module) == 4:
        from bitsandbytes import functional as F

        keep_differentiable(module)  # undoes a repacking, which could not be read
        values: Tensor = F.dequantize_4bit(weight.detach(), weight.quant_state)
        return values.to(dtype)
    # The numbers and their scales move from the weight to the layer's state in the first forward.
    moved = module.state.CB is not None
    codes, scales = (module.state.CB, module.state.SCB) if moved else (weight.CB, weight.SCB)
    product: Tensor = codes.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    return product


def prepare_to_load(module: Any) -> None:
    """Let a quantised layer that has run a forward load a checkpoint.

    The first forward of an 8-bit layer moves its scales from the weight to the layer's state, and
    loading looks for them in the weight; the next forward moves them again.
    """
    if linear_bits(module) == 8 and module.state.SCB is not None:
        weight = module._parameters["weight"]
        weight.CB, weight.SCB = module.state.CB, module.state.SCB


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers in a format that they can be differentiated in.

    On some CPUs an evaluation repacks the weights for inference for good, and training after it
    runs an operator without a gradient. Weights that were repacked already are unpacked; where
    their scales were quantised too (double quantisation), these are then rounded once more.
    """
    if "bitsandbytes.nn" not in sys.modules:
        return
    from bitsandbytes import functional as F
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if not isinstance(module, Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        weight: Any = module._parameters["weight"]
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            unpacked, state = F._convert_weight_packed_for_cpu_inverse(weight.data, state)
            weight.data, weight.quant_state = unpacked, state
