"""All architectures of the matrix."""

from __future__ import annotations

from . import (
    decoders,
    encoder_decoders,
    encoders,
    experts,
    multimodal,
    speech,
    state_space,
    vision,
    with_timm,
)

CATALOGUE = (
    *decoders.ARCHITECTURES,
    *experts.ARCHITECTURES,
    *state_space.ARCHITECTURES,
    *encoders.ARCHITECTURES,
    *encoder_decoders.ARCHITECTURES,
    *vision.ARCHITECTURES,
    *with_timm.ARCHITECTURES,
    *speech.ARCHITECTURES,
    *multimodal.ARCHITECTURES,
)
