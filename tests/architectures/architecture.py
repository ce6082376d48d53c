"""What an entry of the catalogue is, and pieces that many entries are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Keyword arguments of a model's forward."""

VOCABULARY = 64
WIDTH = 32
INNER = 48
LAYERS = 2
HEADS = 4
TOKENS = 8
BATCH = 2
SIDE = 32
"""Pixels of an image, each way."""

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
"""What most configurations of transformers call these sizes."""


@dataclass(frozen=True)
class Architecture:
    """A tiny model with random weights, and batches for it."""

    name: str
    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    """Of a seed."""
    library: str = "transformers"
    takes_gradients: bool = True
    """Whether the model's own inputs may ask for their gradient: some models ask for it
    themselves, and fail where somebody has already."""

    def __str__(self) -> str:
        return self.name


def build_pretrained(model_class: str, **settings: Any) -> Callable[[], nn.Module]:
    """Make a model of transformers from the settings of its configuration."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, model_class)
        model: nn.Module = kind(kind.config_class(**settings))
        return model

    return build


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_ids(seed: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, tokens), generator=generator(seed))


def tokens(seed: int) -> Batch:
    return {"input_ids": token_ids(seed)}


def token_pairs(seed: int) -> Batch:
    """Inputs of an encoder and of its decoder."""
    return {"input_ids": token_ids(seed), "decoder_input_ids": token_ids(seed + 100)}


def images(seed: int) -> Batch:
    pixels = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator(seed))
    return {"pixel_values": pixels}
