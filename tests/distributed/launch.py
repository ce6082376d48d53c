"""Functions run by several processes that train together: gloo, on the CPU."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 240.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed.preloaded"])


def on_ranks(count: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Call a function of a module in `count` processes; what it returns, by rank.

    Args:
        count: processes.
        function: called with `args` on every rank; must be importable by its name.
        folder: an empty folder for what the processes tell each other.
        args: anything that pickles.

    Raises:
        AssertionError: a process has failed, with its traceback, or has not ended in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        _CONTEXT.Process(
            target=_rank, args=(rank, count, function, str(folder), args, dict(os.environ))
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    told = [folder / f"error-{rank}" for rank in range(count)]
    errors = "\n".join(path.read_text() for path in told if path.exists())
    assert not errors, errors
    assert not late, f"{len(late)} of {count} processes have not ended in {TIMEOUT:.0f} s"
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(count)]


def _rank(
    rank: int,
    count: int,
    function: Any,
    folder: str,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.environ |= environment  # the server of processes has that of the first call
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{folder}/store", count),
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(seconds=TIMEOUT / 2),
        )
        torch.save(function(*args), f"{folder}/result-{rank}")
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
