"""Models without data: the structure of a model on fake tensors, which have shapes but no bytes.

Fake CPU tensors choose the same attention kernels as real ones (the flash type, which keeps q, k,
v, output and log-sum-exp), and need neither a GPU nor the room that the weights would take.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

ModelT = TypeVar("ModelT", bound=nn.Module)


class FakeWorld:
    """One fake-tensor mode and what was copied into it; tensors of two worlds don't mix.

    Everything that runs a copy must run ``with world:``.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # ids in the memo stay valid while their objects live

    def __enter__(self) -> FakeWorld:
        self.mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.mode.__exit__(*error)

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
        return pytree.tree_map(lambda x: self.tensor(x) if isinstance(x, Tensor) else x, batch)

    def model(self, model: ModelT) -> ModelT:
        """A copy of a model's structure on fake tensors; the model's own data is not touched.

        Hooks, compressed layers, adapters and shared weights are copied with it. Gradients and
        optimizers are not.
        """
        memo = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            memo[id(tensor)] = self.tensor(tensor)
        twin = copy.deepcopy(model, memo)  # outside of the mode: copying may look at real numbers
        for module in twin.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor):  # held without being registered
                    vars(module)[name] = self.tensor(value)
        return twin
