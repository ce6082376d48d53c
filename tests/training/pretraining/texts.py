"""A small corpus, a tiny architecture, and a recipe that pre-trains it in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import transformers

SUBJECTS = ["The cat", "A dog", "One bird", "Every child", "The old engineer", "Nobody"]
VERBS = ["sees", "likes", "measures", "writes about", "forgets", "compresses"]
OBJECTS = ["the house", "a gradient", "42 tokens", "the café", "two weights", "its memory"]
PLACES = ["in the morning", "under a bridge", "without help", "far from here", "again", "by train"]


def documents(count: int = 60, seed: int = 0) -> list[str]:
    """Texts of about 300 characters, all different."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, PLACES)) + "."

    return [f"{n}. " + " ".join(sentence() for _ in range(10)) for n in range(count)]


def save_jsonl(path: Path, texts: list[str]) -> Path:
    """Write documents as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def save_config(path: Path, **changes: Any) -> Path:
    """Write the config.json of a two-block LLaMA of width 32."""
    settings: dict[str, Any] = {
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "architectures": ["LlamaForCausalLM"],
    }
    config = transformers.LlamaConfig(**settings | changes)
    config.to_json_file(path, use_diff=False)
    return path


def recipe_dict(config: Path, corpus: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """A recipe for the tiny architecture, as YAML has it."""
    recipe: dict[str, Any] = {
        "task": "pretrain",
        "model": str(config),
        "dtype": "float32",
        "velora": {"sub_token_size": 4, "init": "random", "vectors": "per_group"},
        "tokenizer": {"vocab_size": 360},
        "data": {"train": str(corpus), "max_length": 16, "eval_fraction": 0.2},
        "train": {
            "output": str(output),
            "tokens": 16 * 4 * 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "log_every": 1,
            "tensorboard": False,
        },
        "evaluate": {"max_examples": 20},
    }
    for name, values in sections.items():
        known = recipe.get(name)
        merge = isinstance(values, dict) and isinstance(known, dict)
        recipe[name] = {**known, **values} if merge else values
    return recipe
