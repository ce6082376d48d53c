"""Small vision and language models with random weights, in float64, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .. import tiny_models
from ..tiny_models import WIDTH, image_batch, pair_batch, run, token_batch


def dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return Dinov2ForImageClassification(config).eval()


def timm_vit() -> Any:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=WIDTH,
        depth=2,
        num_heads=4,
        num_classes=3,
    ).eval()


def classifier_bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).eval()


def images(seed: int = 0) -> Tensor:
    return image_batch(seed)["pixel_values"].double()


def image_dict(seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": images(seed)}


Case = tuple[Callable[[], Any], Callable[[], Any], list[str], list[str]]

_CASES: dict[str, Case] = {
    "vit": (tiny_models.vit, image_dict, ["classifier"], ["classifier"]),
    "dinov2": (dinov2, image_dict, ["classifier"], ["classifier"]),
    "timm-vit": (timm_vit, images, ["head"], ["head"]),
    "bert": (classifier_bert, token_batch, ["classifier"], ["classifier"]),
    "llama": (tiny_models.llama, token_batch, ["lm_head"], []),
    "llama-tied": (lambda: tiny_models.llama(tied=True), token_batch, ["lm_head"], []),
    "gpt2": (tiny_models.gpt2, token_batch, ["lm_head"], []),
    "t5": (tiny_models.t5, pair_batch, ["lm_head"], []),
}
"""How to build it, a batch, its head, and what of that trains beside adapters."""

CASES = [pytest.param(case, id=name) for name, case in _CASES.items()]
VISION = [pytest.param(_CASES[name], id=name) for name in ("vit", "dinov2", "timm-vit")]


def build(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    return case[0]().to(dtype)


def disturb(model: nn.Module) -> None:
    """Move all that trains away from where it starts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def output(model: nn.Module, batch: Any) -> Tensor:
    return run(model, batch)
