"""``nn.Linear`` and its subclasses that keep its forward."""

from __future__ import annotations

from torch import nn

from velora_torch.layers.base import CompressedLayer


class CompressedLinear(CompressedLayer):
    """A linear layer; its weight is (O, D)."""

    transposed = False


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes what ``nn.Linear.forward`` computes."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
