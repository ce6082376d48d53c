"""Models of images, of transformers."""

from __future__ import annotations

from typing import Any

from .architecture import (
    HEADS,
    INNER,
    LAYERS,
    SIDE,
    WIDTH,
    Architecture,
    build_pretrained,
    images,
)

KIND = "vision"
VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": 8,
}
PYRAMID = {"depths": [1, 1], "num_labels": 3}


def vision(name: str, model_class: str, **settings: Any) -> Architecture:
    return Architecture(name, KIND, build_pretrained(model_class, **settings), images)


ARCHITECTURES = (
    vision("vit", "ViTForImageClassification", num_labels=3, **VIT),
    vision("beit", "BeitForImageClassification", num_labels=3, **VIT),
    vision("dinov2", "Dinov2ForImageClassification", num_labels=3, **VIT),
    vision(
        "swin",
        "SwinForImageClassification",
        image_size=SIDE,
        patch_size=4,
        window_size=4,
        embed_dim=16,
        num_heads=[2, 4],
        **PYRAMID,
    ),
    vision(
        "convnext", "ConvNextForImageClassification", hidden_sizes=[16, 32], num_stages=2, **PYRAMID
    ),
    vision(
        "segformer",
        "SegformerForSemanticSegmentation",
        hidden_sizes=[16, 32],
        num_encoder_blocks=2,
        num_attention_heads=[2, 4],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=WIDTH,
        **PYRAMID,
    ),
)
