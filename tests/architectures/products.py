"""Which modules of a model hold a parameter that is a factor of a product, seen while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.mv,
    torch.ops.aten.addmv,
    torch.ops.aten.convolution,
    torch.ops.aten._grouped_mm,
}
"""Matrix products and convolutions, as PyTorch's operators end up in them."""


class _Watch(TorchDispatchMode):
    """Follows parameters, and what is computed from parameters alone, into products."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.factors: set[int] = set()
        """Ids of the parameters."""
        self._made_of: Any = WeakIdKeyDictionary()
        self._addresses = {p.untyped_storage().data_ptr(): id(p) for p in model.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sources = [self._sources(tensor) for tensor in given]
        result = func(*args, **kwargs)
        everything = set().union(*sources)
        if given and all(sources):
            for made in pytree.tree_leaves(result):
                if isinstance(made, Tensor):
                    self._made_of[made] = everything
        if func.overloadpacket in PRODUCTS:
            self.factors |= everything
        return result

    def _sources(self, tensor: Tensor) -> set[int]:
        """Ids of the parameters that a tensor consists of; empty if of anything else too."""
        known: set[int] = self._made_of.get(tensor, set())
        own = self._addresses.get(tensor.untyped_storage().data_ptr())
        return known if own is None else {own}


@contextmanager
def product_holders(model: nn.Module) -> Iterator[list[str]]:
    """Collect names of the modules whose own parameters are factors of products in the block.

    A parameter that several modules hold is a factor of the linear layer among them.
    """
    found: list[str] = []
    with torch.no_grad(), _Watch(model) as watch:
        yield found
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for parameter in watch.factors:
        names = owners[parameter]
        linear = [n for n in names if isinstance(model.get_submodule(n), nn.Linear)]
        found += linear or names[:1]
    found[:] = list(dict.fromkeys(found))
