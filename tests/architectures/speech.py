"""Models of sound."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import (
    BATCH,
    HEADS,
    INNER,
    LAYERS,
    SPECIAL,
    USUAL,
    VOCABULARY,
    WIDTH,
    Architecture,
    Batch,
    build_pretrained,
    generator,
    token_ids,
)

KIND = "speech"
WAVES = USUAL | {
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "mask_time_length": 2,
    "layerdrop": 0.0,
    "classifier_proj_size": 16,
}
MELS = 16
FRAMES = 32


def waves(seed: int) -> Batch:
    return {"input_values": torch.randn(BATCH, 400, generator=generator(seed))}


def spectrograms(seed: int) -> Batch:
    spectrum = torch.randn(BATCH, MELS, FRAMES, generator=generator(seed))
    return {"input_features": spectrum, "decoder_input_ids": token_ids(seed)}


def speech(name: str, model_class: str, **settings: Any) -> Architecture:
    build = build_pretrained(model_class, **settings)
    return Architecture(name, KIND, build, waves, takes_gradients=False)


ARCHITECTURES = (
    speech("wav2vec2", "Wav2Vec2ForCTC", **WAVES),
    speech("wavlm", "WavLMForCTC", **WAVES),
    Architecture(
        "whisper",
        KIND,
        build_pretrained(
            "WhisperForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            num_mel_bins=MELS,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=INNER,
            decoder_ffn_dim=INNER,
            max_source_positions=FRAMES // 2,
            max_target_positions=32,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **SPECIAL,
        ),
        spectrograms,
    ),
)
