"""Models of images and text together."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import (
    BATCH,
    SIDE,
    SPECIAL,
    USUAL,
    Architecture,
    Batch,
    build_pretrained,
    generator,
    images,
    token_ids,
)
from .decoders import GROUPED
from .vision import VIT

KIND = "multimodal"
IMAGE_TOKEN = 5
PATCHES = (SIDE // 8) ** 2
TEXT = USUAL | SPECIAL | {"projection_dim": 16}


def captioned(seed: int) -> Batch:
    """Images and texts that belong to them."""
    return {"input_ids": token_ids(seed), **images(seed)}


def interleaved(image_tokens: int) -> Any:
    """Texts that begin with the places of an image."""

    def batch(seed: int) -> Batch:
        text = token_ids(seed).clamp(min=IMAGE_TOKEN + 1)
        places = torch.full((BATCH, image_tokens), IMAGE_TOKEN)
        return {"input_ids": torch.cat([places, text], 1), **images(seed)}

    return batch


def framed(seed: int) -> Batch:
    """The same, where every sample has a list of images."""
    batch = interleaved(PATCHES // 4)(seed)
    return batch | {"pixel_values": batch["pixel_values"][:, None]}


def flattened(seed: int) -> Batch:
    """The same, where images are given as rows of patches."""
    batch = interleaved(PATCHES // 4)(seed)
    rows = torch.randn(BATCH * PATCHES, 3 * 2 * 8 * 8, generator=generator(seed))
    grid = torch.tensor([[1, SIDE // 8, SIDE // 8]] * BATCH)
    kinds = (batch["input_ids"] == IMAGE_TOKEN).int()
    return {
        "input_ids": batch["input_ids"],
        "pixel_values": rows,
        "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


ARCHITECTURES = (
    Architecture(
        "clip",
        KIND,
        build_pretrained(
            "CLIPModel",
            text_config=TEXT,
            vision_config=VIT | {"projection_dim": 16},
            projection_dim=16,
        ),
        captioned,
    ),
    Architecture(
        "siglip",
        KIND,
        build_pretrained("SiglipModel", text_config=TEXT, vision_config=VIT),
        captioned,
    ),
    Architecture(
        "blip",
        KIND,
        build_pretrained(
            "BlipForConditionalGeneration",
            text_config=TEXT | {"encoder_hidden_size": 32},
            vision_config=VIT,
        ),
        captioned,
    ),
    Architecture(
        "vilt",
        KIND,
        build_pretrained(
            "ViltForQuestionAnswering", num_labels=3, **USUAL, image_size=SIDE, patch_size=8
        ),
        captioned,
    ),
    Architecture(
        "llava",
        KIND,
        build_pretrained(
            "LlavaForConditionalGeneration",
            text_config=GROUPED | {"model_type": "llama"},
            vision_config=VIT | {"model_type": "clip_vision_model", "projection_dim": 16},
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
        ),
        interleaved(PATCHES),
    ),
    Architecture(
        "smolvlm",
        KIND,
        build_pretrained(
            "SmolVLMForConditionalGeneration",
            text_config=GROUPED | {"model_type": "llama"},
            vision_config=VIT,
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
        ),
        framed,
    ),
    Architecture(
        "qwen2_vl",
        KIND,
        build_pretrained(
            "Qwen2VLForConditionalGeneration",
            text_config=GROUPED
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            image_token_id=IMAGE_TOKEN,
            video_token_id=6,
            vision_start_token_id=3,
            vision_end_token_id=4,
        ),
        flattened,
    ),
)
