"""Encoders of text, as they are pre-trained."""

from __future__ import annotations

from typing import Any

from .architecture import (
    HEADS,
    INNER,
    LAYERS,
    USUAL,
    VOCABULARY,
    WIDTH,
    Architecture,
    build_pretrained,
    tokens,
)

KIND = "encoder"


def encoder(name: str, model_class: str, **settings: Any) -> Architecture:
    return Architecture(name, KIND, build_pretrained(model_class, **settings), tokens)


ARCHITECTURES = (
    encoder("bert", "BertForMaskedLM", **USUAL),
    encoder("roberta", "RobertaForSequenceClassification", **USUAL),
    encoder("electra", "ElectraForPreTraining", embedding_size=16, **USUAL),
    encoder("albert", "AlbertForMaskedLM", embedding_size=16, **USUAL),
    encoder(
        "distilbert",
        "DistilBertForMaskedLM",
        vocab_size=VOCABULARY,
        dim=WIDTH,
        hidden_dim=INNER,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=64,
    ),
    encoder(
        "deberta_v2",
        "DebertaV2ForMaskedLM",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=16,
        **USUAL,
    ),
    encoder(
        "modernbert",
        "ModernBertForMaskedLM",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        **USUAL,
    ),
    encoder("mpnet", "MPNetForMaskedLM", **USUAL),
    encoder(
        "xlnet",
        "XLNetLMHeadModel",
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        d_inner=INNER,
    ),
)
