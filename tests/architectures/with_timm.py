"""Models of images, of timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .architecture import SIDE, WIDTH, Architecture, Batch, images

KIND = "vision"
VIT = {"embed_dim": WIDTH, "depth": 2, "num_heads": 4, "img_size": SIDE, "patch_size": 8}


def pictures(seed: int) -> Batch:
    return {"x": images(seed)["pixel_values"]}


def build_timm(model: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(model, num_classes=3, **settings)
        return made

    return build


def build_mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(num_classes=3, img_size=SIDE, patch_size=8, num_blocks=2, embed_dim=WIDTH)
    nn.init.normal_(
        model.get_parameter("head.weight"), std=0.1
    )  # zero at first, and then no gradient gets by
    return model


def timm_model(name: str, model: str, **settings: Any) -> Architecture:
    return Architecture(f"timm-{name}", KIND, build_timm(model, **settings), pictures, "timm")


ARCHITECTURES = (
    timm_model("vit", "vit_tiny_patch16_224", **VIT),
    timm_model("beitv2", "beitv2_base_patch16_224", **VIT),
    timm_model("eva02", "eva02_tiny_patch14_224", **VIT),
    Architecture("timm-mixer", KIND, build_mixer, pictures, "timm"),
    timm_model(
        "swin",
        "swin_tiny_patch4_window7_224",
        img_size=SIDE,
        window_size=4,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 4),
    ),
    timm_model("convnext", "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 16, 32)),
    timm_model("vit_map", "vit_base_patch16_siglip_224", **VIT),
)
