"""VeLoRA for PyTorch: compressed activations, gradients that are factors.

A compressed linear layer keeps one number per sub-token for its backward pass instead of its
whole input, and trains a small matrix of coefficients instead of its weight; after each optimizer
step the coefficients are folded into the weight. See ``docs/method.md``.
"""

from typing import TYPE_CHECKING

from velora_torch import lazy

if TYPE_CHECKING:
    from velora_torch import memory
    from velora_torch.choosing import check_ranks, choose_vectors
    from velora_torch.config import VeloraConfig
    from velora_torch.export import export_lora
    from velora_torch.model import compress, fold, restore
    from velora_torch.overview import summary
    from velora_torch.recomputation import recompute as recompute

__all__ = [
    "VeloraConfig",
    "check_ranks",
    "choose_vectors",
    "compress",
    "export_lora",
    "fold",
    "memory",
    "restore",
    "summary",
]
__version__ = "0.1.0"

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "VeloraConfig": "config",
        "check_ranks": "choosing",
        "choose_vectors": "choosing",
        "compress": "model",
        "export_lora": "export",
        "fold": "model",
        "memory": None,
        "recompute": "recomputation",
        "restore": "model",
        "summary": "overview",
    },
)
