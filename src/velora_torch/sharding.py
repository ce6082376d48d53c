"""Parameters of which every rank holds a block: FSDP2's and tensor parallel's ``DTensor``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


class Block(NamedTuple):
    """Where a rank's block lies in a whole matrix."""

    row: int
    column: int
    rows: int
    """Of the whole matrix."""
    columns: int

    @property
    def transposed(self) -> Block:
        """The same block of the transposed matrix."""
        return Block(self.column, self.row, self.columns, self.rows)


def is_sharded(tensor: Tensor | None) -> TypeIs[DTensor]:
    """Whether a rank holds a block of the tensor; does not import what makes such tensors."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds, sharing memory; a tensor that is not sharded itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; every rank must ask."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def whole_in_first(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU of the first process, nothing of it elsewhere; all must ask.

    A tensor that is not sharded is returned itself.
    """
    if not is_sharded(tensor):
        return tensor
    full = whole(tensor.detach())
    return full.cpu() if torch.distributed.get_rank() == 0 else full.new_empty(0)


def block_of(matrix: Tensor) -> Block:
    """Where the part that this rank holds lies in a matrix.

    Raises:
        ValueError: the parts are no blocks, but sums.
    """
    rows, columns = matrix.shape
    if not is_sharded(matrix):
        return Block(0, 0, rows, columns)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(place.is_partial() for place in matrix.placements):
        raise ValueError(
            f"VeLoRA: a weight with placements {matrix.placements} is not made of blocks"
        )
    _, offset = compute_local_shape_and_global_offset(
        matrix.shape, matrix.device_mesh, matrix.placements
    )
    return Block(offset[0], offset[1], rows, columns)


def like(part: Tensor, sharded: Any) -> Tensor:
    """A rank's block as a tensor that is sharded as another one is."""
    if not is_sharded(sharded):
        return part
    made: Tensor = type(sharded).from_local(
        part,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=torch.Size(sharded.shape),
        stride=sharded.stride(),
    )
    return made


def rows_of(matrix: Tensor, block: Block, count: int) -> Tensor:
    """Rows of a matrix that belong to a block with so many rows; local where they are here."""
    part = local(matrix)
    if not is_sharded(matrix):
        return part[block.row : block.row + count]
    here = block_of(matrix)
    if here.row == block.row and part.shape == (count, matrix.shape[1]):
        return part
    return whole(matrix)[block.row : block.row + count]


def as_sharded(tensor: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor, of which this rank keeps the block that it has of another one."""
    return like(_my_block(tensor, sharded).clone(), sharded) if is_sharded(sharded) else tensor


def copy_whole_(target: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    local(target).copy_(_my_block(tensor, target))


def _my_block(tensor: Tensor, sharded: Tensor) -> Tensor:
    if not is_sharded(sharded):
        return tensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    ranges = (slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return tensor.to(local(sharded).device)[tuple(ranges)]
