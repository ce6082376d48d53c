"""A compressed layer under tensor parallel: each rank's part of it, as plain tensors.

The layouts are those of ``ColwiseParallel`` and ``RowwiseParallel``. Ranks of the mesh hold

* colwise: rows of the weight, of the bias and of ``coef``; all features of the input. Each rank has
  its rows of C, and the gradients of the input are summed;
* rowwise: columns of the weight, and the input's features to match; outputs are summed. ``coef`` is
  whole on every rank, of which a rank works on the groups that it has features of.

A rank keeps z of the groups that it works on alone, and vectors are whole everywhere.

Shapes: O output features, D input features, G groups, M features per sub-token.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from velora_torch.sharding import is_sharded

if TYPE_CHECKING:
    from velora_torch.layers.base import CompressedLayer

STYLES = "torch.distributed.tensor.parallel.style"

SUPPORTED = (
    "Supported are nn.Linear layers that torch's parallelize_module has given ColwiseParallel or "
    "RowwiseParallel after velora_torch.compress, on a mesh of one dimension, with FSDP2 over "
    "another one if need be"
)


@dataclass
class Parts:
    """What a rank computes with."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    coef: Tensor | None
    groups: slice
    """Those that the features of x belong to."""
    rowwise: bool
    mesh: Any
    late_bias: Tensor | None
    """What is added to the sum over ranks."""

    def joined(self, y: Tensor) -> Tensor:
        """This rank's output as its part of the layer's."""
        from torch.distributed.tensor import DTensor, Partial, Shard

        if not self.rowwise:
            return DTensor.from_local(y, self.mesh, [Shard(y.dim() - 1)], run_check=False)
        summed: Tensor = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        return summed if self.late_bias is None else summed + self.late_bias


def parts_of(layer: CompressedLayer, x: Tensor, bias: Tensor | None) -> Parts | None:
    """What this rank computes of a product; nothing where tensors are not split.

    Raises:
        RuntimeError: names the layer, and what its tensors are split by.
    """
    weight: Any = layer.raw_weight
    coef: Any = layer._parameters["coef"]
    split: Any = x
    split_bias: Any = bias
    if not any(is_sharded(tensor) for tensor in (x, weight, bias, coef)):
        return None
    from torch.distributed.tensor import Partial, Replicate, Shard

    if not (is_sharded(x) and is_sharded(weight)):
        sharded, plain = ("input", "weight") if is_sharded(x) else ("weight", "input")
        _refuse(layer, f"its {sharded} is a DTensor and its {plain} is not")
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        _refuse(layer, f"its weight is split over a mesh of {mesh.ndim} dimensions at once")
    for name, other in (("input", x), ("bias", bias), ("coef", coef)):
        if other is not None and (not is_sharded(other) or other.device_mesh != mesh):
            _refuse(layer, f"its {name} does not live on the mesh of its weight")
    placed = tuple(
        None if tensor is None else tensor.placements[0]
        for tensor in (weight, split, split_bias, coef)
    )
    last = Shard(x.dim() - 1)
    if (
        placed[:2] == (Shard(0), Replicate())
        and placed[2] in (None, Shard(0))
        and placed[3] in (None, Shard(0))
        and not layer.transposed
    ):
        mine = split.to_local(grad_placements=[Partial()])
        return Parts(
            mine, weight.to_local(), _part(bias), _part(coef), slice(None), False, mesh, None
        )
    if not (
        placed[:2] == (Shard(1), last)
        and placed[2] in (None, Replicate())
        and placed[3] in (None, Replicate())
        and not layer.transposed
    ):
        told = zip(("weight", "input", "bias", "coef"), placed, strict=True)
        _refuse(layer, ", ".join(f"its {n} is {p}" for n, p in told if p is not None))
    groups = _groups(layer, mesh)
    if is_sharded(coef):  # by columns, and their gradients are gathered again
        coef = coef.redistribute(placements=[Shard(1)])
    return Parts(split.to_local(), weight.to_local(), None, _part(coef), groups, True, mesh, bias)


def _part(tensor: Tensor | None) -> Tensor | Any | None:
    return tensor.to_local() if is_sharded(tensor) else tensor


def _groups(layer: CompressedLayer, mesh: Any) -> slice:
    """The groups of this rank's features, split as ``Shard`` splits them."""
    ranks, size = mesh.size(), layer.velora.size
    width = -(-layer.features // ranks)
    if width % size or width * (ranks - 1) >= layer.features:
        _refuse(
            layer,
            f"it is rowwise, with {layer.features} input features split every {width}, which is "
            f"not between groups of {size}; choose num_groups or sub_token_size so that a rank's "
            f"features are whole groups",
        )
    rank = mesh.get_local_rank()
    return slice(rank * (width // size), (rank + 1) * (width // size))


def all_features(x: Tensor) -> Tensor:
    """The tokens with all features, to choose vectors from; every rank of the mesh must ask."""
    return x.full_tensor() if is_sharded(x) else x


def refuse_if_split(layer: CompressedLayer, x: Tensor) -> None:
    """Refuse tensor parallel of a layer that computes otherwise than ``nn.Linear``.

    Raises:
        RuntimeError: names the layer.
    """
    if is_sharded(x) or is_sharded(layer.raw_weight):
        _refuse(layer, f"it computes as a {layer.plain_class.__name__}")


def _refuse(layer: CompressedLayer, why: str) -> None:
    raise RuntimeError(
        f"VeLoRA: layer {layer.velora.name!r} can't be trained in tensor parallel as it is split: "
        f"{why}. {SUPPORTED}. Leave the layer out of `targets`, or out of the parallelize plan"
    )


def is_partitioning() -> bool:
    """Whether the reader of a layer's ``weight`` is a style that is about to split it.

    It wants the parameter, and not an alias in a graph.
    """
    return STYLES in sys.modules and sys._getframe(2).f_globals.get("__name__") == STYLES


def localise(layer: nn.Module) -> None:
    """Make tensors plain that every rank has wholly, and that splitting a layer has wrapped."""
    for name, buffer in layer._buffers.items():
        if not name.startswith("velora_") or not is_sharded(buffer):
            continue
        if all(place.is_replicate() for place in buffer.placements):
            layer._buffers[name] = buffer.to_local()


def shards(tensor: Tensor | None) -> int:
    """Over how many dimensions of a mesh a tensor is split: FSDP gathers one for a forward."""
    return tensor.device_mesh.ndim if is_sharded(tensor) else 0
