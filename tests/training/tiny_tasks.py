"""Tiny models and data for classification and regression: two blocks, three classes, seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

CLASSES = ("left", "middle", "right")


def save_encoder(folder: Path) -> Path:
    """A two-block BERT of width 32 and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "one", "two", "three", "four", "five", "six"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def save_texts(path: Path, count: int = 48, pairs: bool = False, number: bool = False) -> Path:
    """Rows whose label is in their first word."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        place = index % 3
        text = f"{('one', 'two', 'three')[place]} {('four', 'five', 'six', 'one')[index % 4]}"
        text += " four" * (index // 12)
        row: dict[str, Any] = {"sentence": text, "label": CLASSES[place]}
        if pairs:
            row["sentence2"] = "five six"
        if number:
            row["label"] = place / 2
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_vit(folder: Path) -> Path:
    """A two-block ViT of width 32 for images of 16 pixels, with its preprocessor."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    )
    transformers.ViTModel(config).save_pretrained(folder)
    form = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(form), encoding="utf-8")
    return folder


def save_pictures(folder: Path, count: int = 12) -> Path:
    """A folder for each class; the class is where the light is."""
    noise = np.random.default_rng(0)
    for place, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = noise.integers(0, 60, (24, 24, 3)).astype(np.uint8)
            pixels[:, place * 8 : place * 8 + 8] = 220
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def recipe_dict(task: str, model: Path, data: Path, output: Path, **sections: Any) -> Any:
    """A recipe that learns a tiny task in a second."""
    recipe: dict[str, Any] = {
        "task": task,
        "model": str(model),
        "dtype": "float32",
        "velora": {"sub_token_size": 4, "init": "random", "vectors": "per_group"},
        "data": {"train": str(data), "eval_fraction": 0.25},
        "train": {
            "output": str(output),
            "steps": 20,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "log_every": 1,
            "tensorboard": False,
        },
    }
    if task != "image-classification":
        recipe["data"]["max_length"] = 16
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
    return recipe
