"""Models with an encoder and a decoder, of text."""

from __future__ import annotations

from typing import Any

from .architecture import (
    HEADS,
    INNER,
    LAYERS,
    SPECIAL,
    VOCABULARY,
    WIDTH,
    Architecture,
    build_pretrained,
    token_pairs,
)

KIND = "encoder-decoder"
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
BART = SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}


def encoder_decoder(name: str, model_class: str, **settings: Any) -> Architecture:
    return Architecture(name, KIND, build_pretrained(model_class, **settings), token_pairs)


ARCHITECTURES = (
    encoder_decoder("t5", "T5ForConditionalGeneration", **T5),
    encoder_decoder("bart", "BartForConditionalGeneration", **BART),
    encoder_decoder("marian", "MarianMTModel", **BART),
    encoder_decoder("m2m_100", "M2M100ForConditionalGeneration", **BART),
)
