"""transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored (D, O)."""

from __future__ import annotations

import sys

from torch import nn

from velora_torch.layers.base import CompressedLayer


class CompressedConv1D(CompressedLayer):
    """A linear layer; its weight is (D, O)."""

    transposed = True


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is a transformers ``Conv1D``; does not import transformers."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return (
        loaded is not None
        and isinstance(module, loaded.Conv1D)
        and type(module).forward is loaded.Conv1D.forward
    )
