"""How several processes share a model."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal, get_args

from velora_torch.config import check_choice
from velora_torch.training.processes import count
from velora_torch.training.schema import Recipe

Strategy = Literal["ddp", "fsdp2", "zero1", "zero2"]
"""Whole in each process; every process a shard of it; or DeepSpeed's ZeRO: whole in each, with the
optimizer's state (1) and the gradients (2) in pieces."""

ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Optimizers that compute each entry by itself: ZeRO steps flat pieces that are no matrices."""
NOT_SHARDED = (
    *("galore", "apollo", "flora"),
    *("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_bnb"),
)
"""How names of optimizers begin that need whole matrices, or are bitsandbytes', whose states have
no rows."""
SPLIT_METHODS = ("full",)
TORCHRUN = "torchrun --nproc-per-node N -m velora_torch train ..."
LAUNCHED = "ACCELERATE_USE_DEEPSPEED"
"""Set by `accelerate launch --use_deepspeed`."""


def chosen(strategy: str | None) -> Strategy:
    """How processes share the model: as asked for, or else as `accelerate launch` was told to.

    Its word for DeepSpeed is taken back, since accelerate would step the optimizer inside of the
    backward pass, before a run can see whether the step is finite or is to be left.

    Raises:
        ValueError: there is no such way, nobody to share with, or no DeepSpeed; says what to do.
    """
    asked = strategy
    if os.environ.get(LAUNCHED, "false").lower() in ("true", "1", "yes"):
        launched = _by_launcher()
        if strategy not in (None, launched):
            raise ValueError(
                f"--strategy {strategy}, and accelerate was told to launch for DeepSpeed's "
                f"{launched}: leave one of them out"
            )
        asked = launched
    asked = asked or "ddp"
    check_choice("strategy", asked, get_args(Strategy))
    if asked != "ddp" and count() == 1:
        raise ValueError(
            f"strategy {asked} shares the model among several processes, and this is the only "
            f"one: start it with {TORCHRUN} --strategy {asked}"
        )
    if zero_stage(asked) and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"--strategy {asked} needs DeepSpeed, which is not installed: pip install deepspeed; "
            f"or use --strategy fsdp2, which shards parameters and optimizer state"
        )
    os.environ.pop(LAUNCHED, None)
    return asked  # type: ignore[return-value]


def _by_launcher() -> str:
    """What `accelerate launch --use_deepspeed` was told, as a strategy."""
    told = {
        name.removeprefix("ACCELERATE_DEEPSPEED_"): value.lower()
        for name, value in os.environ.items()
        if name.startswith("ACCELERATE_DEEPSPEED_")
    }
    stage, instead = told.get("ZERO_STAGE", "2"), None
    if "CONFIG_FILE" in told:
        instead = "a configuration file, and the recipe says how to train: leave it out"
    elif any(
        told.get(f"OFFLOAD_{what}_DEVICE", "none") != "none" for what in ("OPTIMIZER", "PARAM")
    ):
        instead = "offloading, which velora train does not do: leave it out"
    elif stage not in ("1", "2"):
        instead = f"ZeRO stage {stage}: use 1 or 2, or --strategy fsdp2 without --use_deepspeed"
    if instead is not None:
        raise ValueError(f"accelerate was told to launch for DeepSpeed with {instead}")
    return f"zero{stage}"


def zero_stage(strategy: str) -> int | None:
    """The stage of DeepSpeed's ZeRO, if that is the strategy."""
    return int(strategy.removeprefix("zero")) if strategy.startswith("zero") else None


def check_trained(strategy: Strategy, recipe: Recipe) -> None:
    """See that a recipe can be trained that way.

    Raises:
        ValueError: says what to write instead.
    """
    optimizer = recipe.train.optimizer
    if strategy != "ddp" and recipe.lora is not None and recipe.lora.restart_every is not None:
        raise ValueError(
            f"--strategy {strategy} gives each process a part of the weights, and "
            f"lora.restart_every merges adapters into whole ones: leave it out, or use "
            f"--strategy ddp"
        )
    if strategy == "fsdp2" and optimizer.startswith(NOT_SHARDED):
        raise ValueError(
            f"--strategy fsdp2 gives each process rows of the parameters, and train.optimizer "
            f"{optimizer!r} needs them whole: use one of {', '.join(ELEMENTWISE)}, or "
            f"--strategy ddp"
        )
    if not zero_stage(strategy):
        return
    if optimizer not in ELEMENTWISE:
        raise ValueError(
            f"--strategy {strategy} steps flat pieces of the parameters, and train.optimizer "
            f"{optimizer!r} needs them whole: use one of {', '.join(ELEMENTWISE)}, or "
            f"--strategy ddp"
        )
    if recipe.dtype == "float16":
        raise ValueError(
            f"--strategy {strategy} is not for dtype: float16, which needs losses to be scaled: "
            f"use bfloat16"
        )
    if recipe.method == "adalora":
        raise ValueError(
            f"--strategy {strategy} is not for method: adalora, which looks at gradients after "
            f"the step, when ZeRO has dropped them: use lora, or --strategy ddp"
        )
    _check_no_budget(f"--strategy {strategy}", recipe)


def check_split(size: int, strategy: Strategy, recipe: Recipe) -> None:
    """See that the layers of a recipe's model can be split over so many processes.

    Raises:
        ValueError: says what to write instead.
    """
    if size == 1:
        return
    option = f"--tensor-parallel {size}"
    if size < 1:
        raise ValueError(f"{option}: give the number of processes that split each layer")
    if count() % size or count() == 1:
        raise ValueError(
            f"{option}, and the number of processes is {count()}, no multiple of it: start {size} "
            f"with torchrun --nproc-per-node {size} -m velora_torch train ..."
        )
    needed = "ddp" if count() == size else "fsdp2"
    if strategy != needed:
        raise ValueError(
            f"{option} with {count()} processes and --strategy {strategy} don't go together: where "
            f"all of them split each layer leave the strategy out, and where there are more, "
            f"--strategy fsdp2 shards the model over groups of {size}"
        )
    if recipe.method not in SPLIT_METHODS:
        raise ValueError(
            f"{option} splits the layers of the model itself, and method: {recipe.method} puts "
            f"others around them: use method: {' or '.join(SPLIT_METHODS)}, or --strategy fsdp2"
        )
    if recipe.train.optimizer not in ELEMENTWISE:
        raise ValueError(
            f"{option} gives the optimizer parts of matrices, and train.optimizer "
            f"{recipe.train.optimizer!r} needs them whole: use one of {', '.join(ELEMENTWISE)}"
        )
    _check_no_budget(option, recipe)


def _check_no_budget(option: str, recipe: Recipe) -> None:
    if recipe.memory_budget is not None:
        raise ValueError(
            f"memory_budget can't be planned for {option} (it can for --strategy ddp and fsdp2): "
            f"leave one of them out"
        )


def sharding(strategy: Strategy, model: Any) -> dict[str, Any]:
    """Arguments for `TrainingArguments` that shard a model by its repeated blocks, if asked for.

    Raises:
        ValueError: parameters of several types train, which FSDP2 does not shard together.
    """
    if strategy != "fsdp2":
        return {}
    kinds = shards_of(model)
    policy = {"auto_wrap_policy": "NO_WRAP"}
    if kinds:
        policy = {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": sorted(kinds),  # type: ignore[dict-item]
        }
    return {"fsdp": True, "fsdp_config": {"version": 2, **policy}}


def shards_of(model: Any) -> set[str]:
    """Classes of the modules that FSDP2 shards each by itself: repeated blocks, and other types.

    Raises:
        ValueError: parameters of several types train in a layer.
    """
    from velora_torch.blocks import repeated_blocks  # needs PyTorch, which a recipe's check doesn't

    blocks = [block for _, found in repeated_blocks(model) for block in found]
    return {type(block).__name__ for block in blocks} | _of_another_type(model, blocks)


def _of_another_type(model: Any, blocks: list[Any]) -> set[str]:
    """Classes of what is to be sharded apart: FSDP2 wants one type for all that trains in a group.

    Coefficients are float32; norms beside them, say, may have 16 bits.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    rest = [module for module in model.modules() if id(module) not in inside]
    apart: set[str] = set()
    for group in [*([*block.modules()] for block in blocks), rest]:
        types = [_trained_types(module) for module in group]
        if len(set().union(*types)) > 1:
            other = zip(group, types, strict=True)
            apart |= {type(module).__name__ for module, own in other if own - {"float32"}}
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    for name, module in model.named_modules():
        types_here = _trained_types(module)
        shared = any(owners[id(p)] > 1 for p in module.parameters(recurse=False))
        if type(module).__name__ in apart and (len(types_here) > 1 or shared):
            raise ValueError(
                f"--strategy fsdp2 wants one type for all that trains in a layer, and "
                f"{name!r} has {', '.join(sorted(types_here))}"
                f"{' and shares its weight' if shared else ''} (VeLoRA's coefficients are "
                f"float32): set dtype: float32, with train.autocast: true to compute in bfloat16"
            )
    return apart


def _trained_types(module: Any) -> set[str]:
    """The types of a module's own parameters that train."""
    own = module.parameters(recurse=False)
    return {str(p.dtype).removeprefix("torch.") for p in own if p.requires_grad}


def shard_on_cpus(accelerator: Any, plugin: dict[str, Any]) -> bool:
    """Let accelerate shard on CPUs, which it does on every accelerator but not there.

    Args:
        accelerator: of the trainer.
        plugin: arguments of accelerate's `FullyShardedDataParallelPlugin`.

    Returns:
        Whether that was needed.
    """
    from accelerate import DistributedType, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP
    return True
