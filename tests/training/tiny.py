"""A tiny language model in a folder, a data file, and a recipe that trains it in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

WORDS = ["task", "one", "two", "three", "yes", "no", "maybe", "user", "assistant", "system", ":"]
CHAT = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def save_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a two-block LLaMA of width 64 and its word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=CHAT,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def save_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write training rows as JSON lines; by default questions with two answers."""
    if rows is None:
        tasks = [f"task {a} {b}" for a in WORDS[:4] for b in WORDS[:4]]
        rows = [{"instruction": t, "output": "yes" if "one" in t else "no"} for t in tasks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_dict(
    model: Path, rows: Path, output: Path, **sections: dict[str, Any]
) -> dict[str, Any]:
    """A recipe for the tiny model, as YAML has it."""
    recipe: dict[str, Any] = {
        "model": str(model),
        "velora": {"sub_token_size": 4, "init": "random", "vectors": "per_group"},
        "data": {"train": str(rows), "template": "plain", "max_length": 32},
        "train": {
            "output": str(output),
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "log_every": 1,
            "save_every": 2,
            "tensorboard": False,
        },
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
    return recipe


def save_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe file."""
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
