"""The processes of one run, as `torchrun` or `accelerate launch` start them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

_control: Any = None
"""A group of the CPU's backend, for flags: asking it waits for no accelerator."""


def count() -> int:
    """How many processes train together; 1 where no launcher has said otherwise.

    Raises:
        ValueError: WORLD_SIZE is no number.
    """
    asked = os.environ.get("WORLD_SIZE", "1")
    if not asked.isdigit() or int(asked) < 1:
        raise ValueError(f"the environment variable WORLD_SIZE is {asked!r}, no number of processes")
    return int(asked)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Make this process one of those that were started together, while this is open."""
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
    finally:
        _control = None
        dist.destroy_process_group()


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
    if _control is None:
        return flag
    import torch
    import torch.distributed as dist

    told = torch.tensor(int(flag))
    dist.all_reduce(told, dist.ReduceOp.MAX, _control)
    return bool(told)
