"""What several processes send each other, counted where torch calls their group."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

REDUCING = ("allreduce_", "_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor")
GATHERING = ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_")


class Wire(TorchDispatchMode):
    """Counts the bytes that this rank gives to collective calls while it is open.

    Sees what goes through torch's dispatcher: FSDP2, tensor parallel, and collective calls by
    hand. DDP's C++ reducer does not: count in one of its communication hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}
        """By the name of the call."""

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
        """Bytes of gradients that were summed over ranks."""
        return sum(self.bytes.get(name, 0) for name in REDUCING)

    @property
    def gathered(self) -> int:
        """Bytes of shards of parameters."""
        return sum(self.bytes.get(name, 0) for name in GATHERING)
