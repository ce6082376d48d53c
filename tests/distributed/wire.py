"""The bytes that collective calls send while this is open."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

REDUCING = ("allreduce_", "_reduce_scatter_base_", "reduce_scatter_")


class Wire(TorchDispatchMode):
    """Bytes that enter calls of the process group, by the call's name; and their element counts."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count what goes into a collective call."""
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._opname
            given = args[1] if name.startswith(("_reduce_scatter", "_allgather")) else args[0]
            tensors = [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.bytes[name] = self.bytes.get(name, 0) + size
        return func(*args, **(kwargs or {}))

    @property
    def reduced(self) -> int:
        """Bytes of gradients."""
        return sum(self.bytes.get(name, 0) for name in REDUCING)


def hook(counted: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of DDP that counts the bytes it is given."""
    counted.append(bucket.buffer().numel() * bucket.buffer().element_size())
    return allreduce_hook(dist.group.WORLD, bucket)
