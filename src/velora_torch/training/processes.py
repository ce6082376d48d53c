"""The processes of one run, as `torchrun` or `accelerate launch` start them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

_control: Any = None
"""A group of the CPU's backend, for flags: asking it waits for no accelerator."""

_alike = 1


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


@contextlib.contextmanager
def alike(size: int) -> Iterator[None]:
    """Let groups of so many processes take the same examples, while this is open."""
    global _alike
    former, _alike = _alike, size
    try:
        yield
    finally:
        _alike = former


def shares() -> int:
    """Into how many parts, one for each process or group alike, the examples are divided."""
    return max(1, count() // _alike)  # groups of more than there are: refused elsewhere


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
