"""The processes of one run, as `torchrun` or `accelerate launch` start them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal, get_args

from velora_torch.config import check_choice

Strategy = Literal["ddp", "fsdp2"]
"""How several processes share a model: whole in each, or every process a shard of it."""

_control: Any = None
"""A group of the CPU's backend, for flags: asking it waits for no accelerator."""


def count() -> int:
    """How many processes train together; 1 where no launcher has said otherwise.

    Raises:
        ValueError: WORLD_SIZE is no number.
    """
    asked = os.environ.get("WORLD_SIZE", "1")
    if not asked.isdigit() or int(asked) < 1:
        raise ValueError(
            f"the environment variable WORLD_SIZE is {asked!r}, no number of processes"
        )
    return int(asked)


class LostProcessError(OSError):
    """Another process of the run has ended, so that this one can't go on."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Make this process one of those that were started together, while this is open.

    Raises:
        LostProcessError: another one has ended.
    """
    global _control
    if count() == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available())
    _control = dist.new_group(backend="gloo")
    try:
        yield
        dist.barrier(_control)
    except RuntimeError as error:
        if not _tells_of_a_loss(error):
            raise
        raise LostProcessError(
            f"process {os.environ.get('RANK', '0')} of {count()} has lost another one, whose own "
            f"last lines say why ({str(error).splitlines()[0]}). Start all again, with --resume "
            f"to go on from the last checkpoint if there is one"
        ) from error
    finally:
        _control = None
        dist.destroy_process_group()


def _tells_of_a_loss(error: RuntimeError) -> bool:
    """Whether a backend's error is about another process; others are of this one's making."""
    import torch.distributed as dist

    said = ("gloo/transport", "ncclRemoteError")
    return isinstance(error, dist.DistNetworkError) or any(text in str(error) for text in said)


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return count() == 1 or int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process do what others then find done, such as filling a cache."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def wait() -> None:
    """Wait until every process is here."""
    if _control is not None:
        import torch.distributed as dist

        dist.barrier(_control)


def any_of(flag: bool) -> bool:
    """Whether a flag is set in any process; all must ask."""
    return bool(most(int(flag)))


def most(number: int) -> int:
    """The largest of the processes' numbers; all must ask."""
    if _control is None:
        return number
    import torch
    import torch.distributed as dist

    told = torch.tensor(number)
    dist.all_reduce(told, dist.ReduceOp.MAX, _control)
    return int(told)


@contextlib.contextmanager
def not_taken(model: Any) -> Iterator[None]:
    """Let a trainer evaluate a model that another one is to train.

    accelerate marks what it has prepared, if only for an evaluation, and leaves it as it is later:
    the processes would train each on its own.
    """
    mark = "_is_accelerate_prepared"
    former = model.__dict__.get(mark)
    try:
        yield
    finally:
        model.__dict__.pop(mark, None)
        if former is not None:
            model.__dict__[mark] = former


def check_strategy(strategy: str) -> None:
    """See that there are processes to share among, and a way that is known.

    Raises:
        ValueError: says what to write instead.
    """
    check_choice("strategy", strategy, get_args(Strategy))
    if strategy == "fsdp2" and count() == 1:
        raise ValueError(
            "--strategy fsdp2 shards the model over several processes, and this is the only one: "
            "start it with torchrun --nproc-per-node N -m velora_torch train ..."
        )


def sharding(strategy: Strategy, model: Any) -> dict[str, Any]:
    """Arguments for `TrainingArguments` that shard a model by its repeated blocks, if asked for.

    Raises:
        ValueError: parameters of several types train, which FSDP2 does not shard together.
    """
    if strategy == "ddp":
        return {}
    from velora_torch.blocks import repeated_blocks  # needs PyTorch, which a recipe's check doesn't

    blocks = [block for _, found in repeated_blocks(model) for block in found]
    kinds = {type(block).__name__ for block in blocks} | _of_another_type(model, blocks)
    policy = {"auto_wrap_policy": "NO_WRAP"}
    if kinds:
        policy = {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": sorted(kinds),  # type: ignore[dict-item]
        }
    return {"fsdp": True, "fsdp_config": {"version": 2, **policy}}


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
