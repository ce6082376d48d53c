"""Architectures by name, so that a plan needs neither a hub nor a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# hidden, intermediate, heads, layers: the sizes of the paper's LLaMA runs, and two that a CPU can
# pre-train (their names count the blocks' parameters, as GaLore's 60m and 130m do not)
_LLAMA = {
    "llama-3m": (256, 688, 8, 4),
    "llama-15m": (384, 1024, 6, 8),
    "llama-60m": (512, 1376, 8, 8),
    "llama-130m": (768, 2048, 12, 12),
    "llama-350m": (1024, 2736, 16, 24),
    "llama-1b": (2048, 5461, 32, 24),
    "llama-7b": (4096, 11008, 32, 32),
    "llama-13b": (5120, 13824, 40, 40),
}

PRESETS = (*_LLAMA, "roberta-base", "vit-b-16", "smollm2-135m-instruct")
"""Names that :func:`preset` knows."""


def preset(name: str) -> PretrainedConfig:
    """The transformers configuration of a preset, with its ``architectures``."""
    assert name in PRESETS, name
    if name in _LLAMA:
        return _llama(*_LLAMA[name])
    if name == "smollm2-135m-instruct":
        return _smollm2()
    return _roberta() if name == "roberta-base" else _vit()


def _llama(hidden: int, intermediate: int, heads: int, layers: int, **more: Any) -> Any:
    from transformers import LlamaConfig

    settings: dict[str, Any] = {
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        **(settings | more),
    )


def _smollm2() -> Any:
    return _llama(
        576,
        1536,
        9,
        30,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )


def _roberta() -> Any:
    from transformers import RobertaConfig

    return RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=2,
        architectures=["RobertaForSequenceClassification"],
    )


def _vit() -> Any:
    from transformers import ViTConfig

    # CIFAR-100 of VTAB-1k
    return ViTConfig(num_labels=100, architectures=["ViTForImageClassification"])
