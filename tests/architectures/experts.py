"""Mixtures of experts."""

from __future__ import annotations

from typing import Any

from .architecture import (
    HEADS,
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Architecture,
    build_pretrained,
    token_pairs,
    tokens,
)
from .decoders import GROUPED

KIND = "mixture of experts"
CHOSEN = {"num_experts_per_tok": 2}
NARROW = {"moe_intermediate_size": INNER}


def experts(name: str, model_class: str, **settings: Any) -> Architecture:
    return Architecture(name, KIND, build_pretrained(model_class, **settings), tokens)


ARCHITECTURES = (
    experts("mixtral", "MixtralForCausalLM", num_local_experts=4, **CHOSEN, **GROUPED),
    experts(
        "qwen3_moe", "Qwen3MoeForCausalLM", num_experts=4, head_dim=8, **CHOSEN, **NARROW, **GROUPED
    ),
    experts("granitemoe", "GraniteMoeForCausalLM", num_local_experts=4, **CHOSEN, **GROUPED),
    experts(
        "gpt_oss",
        "GptOssForCausalLM",
        num_local_experts=4,
        head_dim=8,
        rope_parameters={"rope_type": "default"},
        **CHOSEN,
        **GROUPED,
    ),
    experts(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        **CHOSEN,
        **NARROW,
        **GROUPED | {"num_key_value_heads": HEADS},
    ),
    Architecture(
        "switch_transformers",
        KIND,
        build_pretrained(
            "SwitchTransformersForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=INNER,
            num_layers=LAYERS,
            num_sparse_encoder_layers=1,
            num_decoder_layers=LAYERS,
            num_sparse_decoder_layers=1,
            num_heads=HEADS,
            num_experts=4,
            expert_capacity=16,
            decoder_start_token_id=0,
        ),
        token_pairs,
    ),
)
