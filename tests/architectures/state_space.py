"""State-space models, recurrent ones, and hybrids of these with attention."""

from __future__ import annotations

from typing import Any

from .architecture import (
    LAYERS,
    SPECIAL,
    VOCABULARY,
    WIDTH,
    Architecture,
    build_pretrained,
    tokens,
)
from .decoders import GROUPED

KIND = "state space"
MAMBA = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "state_size": 8,
}


def state_space(name: str, model_class: str, **settings: Any) -> Architecture:
    return Architecture(name, KIND, build_pretrained(model_class, **settings), tokens)


ARCHITECTURES = (
    state_space("mamba", "MambaForCausalLM", time_step_rank=8, **MAMBA),
    state_space(
        "mamba2",
        "Mamba2ForCausalLM",
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
        **MAMBA,
    ),
    state_space(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        head_dim=8,
        lru_width=WIDTH,
        attention_window_size=16,
        block_types=["recurrent", "attention"],
        **GROUPED,
    ),
    state_space(
        "jamba",
        "JambaForCausalLM",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=8,
        mamba_dt_rank=8,
        **GROUPED,
    ),
    state_space(
        "rwkv",
        "RwkvForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        attention_hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        **SPECIAL,
    ),
    state_space("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"], **GROUPED),
)
