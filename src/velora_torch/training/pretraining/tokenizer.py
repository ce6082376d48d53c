"""The tokenizer of a pre-training run: a given one, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from velora_torch.atomic import keep_folder
from velora_torch.paths import cache_folder
from velora_torch.remote_code import explain, trust
from velora_torch.training.assets import (
    AssetError,
    check_hub_model,
    check_model,
    resolve_model,
)
from velora_torch.training.pretraining.corpus import documents, identity
from velora_torch.training.schema import Recipe

END, PAD = "<|endoftext|>", "<|pad|>"
"""END ends every document, and is the first and the last token of generated text. Padding is a
token of its own, since models do not learn an embedding for it."""
MOST_CHARACTERS = 200_000_000
"""A vocabulary is trained on so much text at most, from the beginning of the corpus."""


def check_tokenizer(recipe: Recipe) -> None:
    """Raise `AssetError` for a tokenizer that is not there."""
    section = recipe.tokenizer
    if section is not None and section.source is not None:
        check_model(section.source)
        check_hub_model(section.source)


def make_tokenizer(recipe: Recipe, say: Callable[[str], None]) -> Any:
    """The tokenizer that the recipe names, or one trained on its corpus, which is kept.

    Raises:
        AssetError: the given one cannot be loaded, or has no end-of-text token.
        DataError: the corpus cannot be read.
    """
    from transformers import AutoTokenizer

    section = recipe.tokenizer
    assert section is not None
    if section.source is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(resolve_model(section.source, say), **trust())
        except (OSError, ValueError) as error:
            reason = explain(section.source, error)
            raise AssetError(
                f"tokenizer.source: cannot load that of {section.source!r}: {reason}"
            ) from None
        if tokenizer.eos_token_id is None:
            raise AssetError(
                f"tokenizer.source: that of {section.source!r} has no end-of-text token, which "
                f"ends each document; choose another, or train one (tokenizer.vocab_size)"
            )
        return tokenizer
    size = section.vocab_size
    assert size is not None
    key = {"corpus": identity(recipe.data), "vocab_size": size}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "tokenizers" / f"bpe-{size}-{digest}"

    def build(work: Path) -> None:
        say(f"training a vocabulary of {size:,} on {recipe.data.train}")
        train_bpe(_beginning(documents(recipe.data, "train")), size, work)

    keep_folder(folder, "tokenizer.json", build)
    return AutoTokenizer.from_pretrained(folder)


def train_bpe(texts: Iterator[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE with `tokenizers` and write it as a tokenizer of transformers.

    Args:
        texts: documents.
        vocab_size: tokens, `END`, `PAD` and the 256 bytes included; a short text gives fewer.
        folder: where it is written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Digits one by one and no space of its own before a word that begins a document.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD
    )
    fast.save_pretrained(folder)


def _beginning(texts: Iterator[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size >= MOST_CHARACTERS:
            return
