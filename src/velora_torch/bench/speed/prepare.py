"""From a variant to a function that takes its training step, and the FLOPs of that step."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    addmm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.module_tracker import ModuleTracker

import velora_torch
from velora_torch.bench.interleave import Step
from velora_torch.bench.speed.reconstruct import reconstruct_then_multiply
from velora_torch.bench.speed.variants import GROUPS, OPTIMIZER, RANK, SpeedVariant
from velora_torch.bench.speed.workload import Workload
from velora_torch.config import VeloraConfig
from velora_torch.memory.count import saved_bytes
from velora_torch.memory.freed import TargetWarning
from velora_torch.recomputation.apply import recompute
from velora_torch.recomputation.blocks import checkpoint_blocks
from velora_torch.selection import select
from velora_torch.subtoken.kernels.fold import operators_only


@dataclass
class Prepared:
    """A step that is ready to be timed; it has been taken once."""

    step: Step
    flops: int
    """Of matrix products, convolutions and attention; of a compiled step those of the same
    step not compiled."""
    result: Callable[[], Tensor]
    """What the last step's forward pass has given."""
    saved: int | None = None
    """Bytes that autograd keeps for the backward pass; None of a compiled step, where they are
    Inductor's choice, and of a part."""


def prepare(variant: SpeedVariant, workload: Workload) -> Prepared:
    """Make a variant from a copy of the workload's model, and take its first step.

    A step: forward and backward pass, fused AdamW, `zero_grad(set_to_none=True)`; always on the
    same batch, without clipping.
    """
    model = _apply(variant, copy.deepcopy(workload.model)).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, **OPTIMIZER)
    kept: dict[str, Any] = {"run": model}
    folding = operators_only if variant.operators else contextlib.nullcontext

    def step() -> None:
        kept["result"] = result = workload.gradients(kept["run"])
        with folding():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if result.is_cuda:
            torch.cuda.synchronize()

    with warnings.catch_warnings():
        # The layers are those that the comparison asks for, whatever they free.
        warnings.simplefilter("ignore", TargetWarning)
        flops = count_flops(step)  # the first step also draws the vectors
        with saved_bytes(model) as count:
            workload.gradients(model)
            saved = count()
    optimizer.zero_grad(set_to_none=True)
    if variant.compiled:
        kept["run"] = torch.compile(model, fullgraph=True)
    return Prepared(step, flops, lambda: kept["result"], None if variant.compiled else saved)


def _apply(variant: SpeedVariant, model: nn.Module) -> nn.Module:
    if variant.method == "lora":
        model = add_lora(model, variant.casts, variant.peft_velora)
    if variant.reconstruct:
        reconstruct_then_multiply(model, GROUPS)
    if variant.velora is not None:
        settings = dict(variant.velora)
        if "sub_token_size" not in settings:
            settings["num_groups"] = GROUPS
        velora_torch.compress(model, VeloraConfig(**settings))
    if variant.recompute:
        recompute(model)
    if variant.checkpoint:
        checkpoint_blocks(model)
    return model


def add_lora(model: nn.Module, casts: bool, own_velora: bool) -> nn.Module:
    """PEFT's LoRA on every linear layer that we would compress.

    Args:
        model: plain; PEFT changes it in place.
        casts: keep adapters in float32 on a 16-bit base, as PEFT does by default.
        own_velora: with PEFT's VeLoRA. Its default takes the mean of every batch anew; here its
            vectors are those of the first batch, as ours are.
    """
    import peft

    own = None
    if own_velora:
        own = peft.VeloraConfig(num_groups=GROUPS, init_type="batch_average_once")
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        target_modules=[chosen.name for chosen in select(model, VeloraConfig()).chosen],
        velora_config=own,
    )
    adapted: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=casts)
    return adapted


def count_flops(step: Step) -> int:
    """FLOPs of a step as torch's counter knows them, attention on a CPU included."""
    aten = torch.ops.aten
    absent = {  # from torch's registry, which has attention on GPUs
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.addmm_: addmm_flop,
    }
    counter = FlopCounterMode(display=False, custom_mapping=absent)
    counter.mod_tracker = _NoModules()
    with counter:
        step()
    return int(counter.get_total_flops())


class _NoModules(ModuleTracker):
    """Follows no modules: its hooks look at outputs, and would compute logits that are deferred."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


Shape = tuple[int, ...]


def _attention(q_shape: Shape, k_shape: Shape, v_shape: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q_shape, k_shape, v_shape))


def _attention_backward(
    dY_shape: Shape, q_shape: Shape, k_shape: Shape, v_shape: Shape, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(dY_shape, q_shape, k_shape, v_shape))
