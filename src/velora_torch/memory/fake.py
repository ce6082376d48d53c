"""Models without data: the structure of a model on fake tensors, which have shapes but no bytes.

Fake CPU tensors choose the same attention kernels as real ones (the flash type, which keeps q, k,
v, output and log-sum-exp), and need neither a GPU nor the room that the weights would take.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from velora_torch.memory.simulator.masks import Rows

ModelT = TypeVar("ModelT", bound=nn.Module)


class FakeWorld:
    """One fake-tensor mode and what was copied into it; tensors of two worlds don't mix.

    Everything that runs a copy must run ``with world:``.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.rows = Rows()
        self._entered: list[ExitStack] = []
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # ids in the memo stay valid while their objects live

    def __enter__(self) -> FakeWorld:
        with ExitStack() as stack:
            stack.enter_context(self.rows.known())
            stack.enter_context(self.mode)
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)

    def tensor(self, tensor: Tensor) -> Tensor:
        """The fake CPU twin of a real or meta tensor: shape, strides, dtype, parameter or not.

        The same tensor has the same twin, and views of one storage become views of one storage
        where they are asked for through the same tensor only.
        """
        if isinstance(tensor, FakeTensor):
            return tensor
        twin = self._memo.get(id(tensor))
        if twin is None:
            with self.mode:
                twin = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            elif tensor.is_leaf and tensor.requires_grad:
                twin.requires_grad_(True)
            self._memo[id(tensor)] = twin
            self._kept.append(tensor)
        return twin

    def batch(self, batch: Any) -> Any:
        """The fake twin of a batch: any nest of lists, tuples, dicts and tensors."""
        self.rows.look(batch)
        return pytree.tree_map(lambda x: self.tensor(x) if isinstance(x, Tensor) else x, batch)

    def model(self, model: ModelT) -> ModelT:
        """A copy of a model's structure on fake tensors; the model's own data is not touched.

        Hooks, compressed layers, adapters and shared weights are copied with it. Gradients and
        optimizers are not.
        """
        # Outside of the mode: copying a compressed layer looks at its real coefficients.
        return copy.deepcopy(model, {id(t): self.tensor(t) for t in _held(model)})


def skeleton(model: ModelT) -> ModelT:
    """A copy of a model's structure on meta tensors, for code that cannot change fake ones.

    (``module.to`` refuses to, and adapters call it.)
    """
    memo: dict[int, Any] = {}
    for tensor in _held(model):
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = twin
    return copy.deepcopy(model, memo)


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules hold without registering them."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))
