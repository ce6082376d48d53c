"""Exact savings beyond linear layers: what is cheap to compute is computed again."""

from velora_torch.recomputation.apply import left_alone, recompute, recomputed, undo_recompute
from velora_torch.recomputation.blocks import checkpoint_blocks, checkpointable

__all__ = [
    "checkpoint_blocks",
    "checkpointable",
    "left_alone",
    "recompute",
    "recomputed",
    "undo_recompute",
]
