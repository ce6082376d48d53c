"""From a recipe for pre-training to a tokenizer, windows of tokens, and an architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from velora_torch.training.assets import cache_folder
from velora_torch.training.data import PreparedData
from velora_torch.training.pretraining.architecture import configuration, for_tokenizer
from velora_torch.training.pretraining.corpus import check_corpus, documents, identity
from velora_torch.training.pretraining.tokenizer import check_tokenizer, make_tokenizer
from velora_torch.training.pretraining.tokens import (
    TokenFile,
    TokenWindows,
    key_of,
    spread,
    tokenise,
)
from velora_torch.training.schema import Recipe
from velora_torch.training.sources import DataError

HELD_OUT_TOKENS = 10_000_000
"""No more held-out text is read, as in GaLore's evaluation on C4."""

Say = Callable[[str], None]


def check_pretraining(recipe: Recipe) -> None:
    """Check in seconds what would fail later: architecture, text, tokenizer.

    Raises:
        AssetError, DataError: something is not there, or does not fit.
    """
    configuration(recipe)
    for name in (recipe.data.train, recipe.data.eval):
        if name is not None:
            check_corpus(name)
    check_tokenizer(recipe)


def prepare_pretraining(recipe: Recipe, say: Say) -> tuple[Any, PreparedData]:
    """Tokenise the corpus, as far as the run needs it, and cut it into windows.

    Returns:
        The tokenizer, and windows to train on and held-out ones.

    Raises:
        AssetError, DataError: something cannot be read, or there is too little text.
    """
    from transformers import default_data_collator

    config = configuration(recipe)
    tokenizer = make_tokenizer(recipe, say)
    data, length = recipe.data, recipe.data.max_length
    budget = recipe.token_budget()
    train = _file(recipe, tokenizer, "train", budget, say)
    held = _file(recipe, tokenizer, "eval", _held_out_limit(recipe), say)
    count = None
    if budget is not None:
        count = budget // length
    elif recipe.train.epochs is not None:
        count = max(1, round(recipe.train.epochs * (len(train) // length)))
    windows = TokenWindows(train, length, count, seed=recipe.train.seed)
    held_out = spread(TokenWindows(held, length), recipe.evaluate.max_examples)
    stats = {
        "format": "tokens",
        "source": data.train,
        "train_examples": train.documents,
        "eval_examples": held.documents,
        "train_rows": len(windows),
        "eval_rows": len(held_out),
        "train_tokens": len(windows) * length,
        "eval_tokens": len(held_out) * length,
        "corpus_tokens": len(train),
        "digests": {"train": train.digest, "eval": held.digest},
        "passes": len(windows) / windows.windows,
        "vocabulary": len(tokenizer),
        "longest": length,
        "mean_length": float(length),
    }
    return tokenizer, PreparedData(
        "tokens",
        windows,
        held_out,
        default_data_collator,
        stats=stats,
        configuration=for_tokenizer(config, tokenizer),
    )


def _held_out_limit(recipe: Recipe) -> int:
    wanted = recipe.evaluate.max_examples
    asked = HELD_OUT_TOKENS if wanted is None else wanted * recipe.data.max_length
    return min(asked, HELD_OUT_TOKENS)


def _file(recipe: Recipe, tokenizer: Any, side: Any, limit: int | None, say: Say) -> TokenFile:
    data = recipe.data
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    end = tokenizer.eos_token_id
    parts = {"corpus": identity(data), "side": side, "vocabulary": vocabulary, "end": end}
    whole = cache_folder() / "tokens" / f"{side}-{key_of(**parts, limit=None)}"
    if limit is not None and not whole.is_dir():  # a file of the whole corpus serves all budgets
        whole = cache_folder() / "tokens" / f"{side}-{key_of(**parts, limit=limit)}"
    say(f"reading {data.train if side == 'train' or data.eval is None else data.eval}: {side}")
    found = tokenise(lambda: documents(data, side), tokenizer, whole, limit, say)
    if len(found) < data.max_length:
        what = "to train on" if side == "train" else "held out (data.eval_fraction)"
        raise DataError(
            f"{data.train}: {len(found):,} tokens are {what}, and data.max_length = "
            f"{data.max_length} are needed at least"
        )
    return found
