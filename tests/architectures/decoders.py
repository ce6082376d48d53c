"""Language models that read from left to right."""

from __future__ import annotations

from typing import Any

from .architecture import (
    HEADS,
    INNER,
    LAYERS,
    SPECIAL,
    USUAL,
    VOCABULARY,
    WIDTH,
    Architecture,
    build_pretrained,
    tokens,
)

KIND = "decoder"
GROUPED = USUAL | SPECIAL | {"num_key_value_heads": 2}
"""With fewer keys and values than queries."""
GPT = SPECIAL | {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
}


def decoder(name: str, model_class: str, **settings: Any) -> Architecture:
    return Architecture(name, KIND, build_pretrained(model_class, **settings), tokens)


ARCHITECTURES = (
    decoder("llama", "LlamaForCausalLM", **GROUPED),
    decoder("mistral", "MistralForCausalLM", **GROUPED),
    decoder("qwen3", "Qwen3ForCausalLM", head_dim=8, **GROUPED),
    decoder("gemma2", "Gemma2ForCausalLM", head_dim=8, **GROUPED),
    decoder("gemma3", "Gemma3ForCausalLM", head_dim=8, **GROUPED),
    decoder("phi", "PhiForCausalLM", **USUAL, **SPECIAL),
    decoder("phi3", "Phi3ForCausalLM", **GROUPED),
    decoder("olmo2", "Olmo2ForCausalLM", **GROUPED),
    decoder("granite", "GraniteForCausalLM", **GROUPED),
    decoder("cohere2", "Cohere2ForCausalLM", head_dim=8, **GROUPED),
    decoder("stablelm", "StableLmForCausalLM", **GROUPED),
    decoder("starcoder2", "Starcoder2ForCausalLM", **GROUPED),
    decoder("smollm3", "SmolLM3ForCausalLM", **GROUPED),
    decoder("gpt2", "GPT2LMHeadModel", **GPT),
    decoder(
        "gpt_neo",
        "GPTNeoForCausalLM",
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        **SPECIAL,
    ),
    decoder("gpt_neox", "GPTNeoXForCausalLM", **USUAL, **SPECIAL),
    decoder(
        "opt",
        "OPTForCausalLM",
        hidden_size=WIDTH,
        ffn_dim=INNER,
        word_embed_proj_dim=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        **SPECIAL,
    ),
    decoder(
        "bloom",
        "BloomForCausalLM",
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        vocab_size=VOCABULARY,
        **SPECIAL,
    ),
    decoder("falcon", "FalconForCausalLM", **USUAL, **SPECIAL),
    decoder(
        "mpt",
        "MptForCausalLM",
        d_model=WIDTH,
        n_heads=HEADS,
        n_layers=LAYERS,
        vocab_size=VOCABULARY,
        max_seq_len=64,
        **SPECIAL,
    ),
)
