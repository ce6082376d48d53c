"""From a recipe for pre-training to a tokenizer, windows of tokens, and an architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from velora_torch.paths import cache_folder
from velora_torch.report.results import RunInfo
from velora_torch.training.data import PreparedData
from velora_torch.training.packaged.manuals import MANUALS
from velora_torch.training.pretraining.architecture import configuration, for_tokenizer
from velora_torch.training.pretraining.corpus import (
    check_corpus,
    documents,
    identity,
    is_split,
    source_of,
)
from velora_torch.training.pretraining.tokenizer import check_tokenizer, make_tokenizer
from velora_torch.training.pretraining.tokens import (
    TokenFile,
    TokenWindows,
    key_of,
    spread,
    tokenise,
)
from velora_torch.training.schema import Recipe
from velora_torch.training.sections import DataSection
from velora_torch.training.sources import DataError, kind_of

HELD_OUT_TOKENS = 10_000_000
"""No more held-out text is read, as in GaLore's evaluation on C4."""

Say = Callable[[str], None]


def check_pretraining(recipe: Recipe) -> None:
    """Check in seconds what would fail later: architecture, text, tokenizer.

    Raises:
        AssetError, DataError: something is not there, or does not fit.
    """
    configuration(recipe)
    data = recipe.data
    for name in (data.train, data.eval):
        if name is not None:
            check_corpus(name)
    _check_held_out(data)
    check_tokenizer(recipe)


def _check_held_out(data: DataSection) -> None:
    source, hint = source_of(data, "eval"), "and data.eval_fraction of the documents are held out"
    has_splits = source not in MANUALS and kind_of(source) == "hub"
    if data.eval_split is not None and not has_splits:
        instead = f"leave it out, {hint}" if data.eval is None else "leave it out"
        raise DataError(
            f"data.eval_split: {source} has no splits, which hub data sets have; {instead}"
        )
    if is_split(data):
        if data.eval_fraction == 0:
            raise DataError(
                "data.eval_fraction: 0 holds out no document, and pre-training measures "
                "perplexity on held-out ones; set a share such as 0.01, or name other text with "
                "data.eval"
            )
    elif source == data.train and (data.eval_split or data.train_split) == data.train_split:
        raise DataError(
            f"{source}: the text to train on would be held out; name other text with data.eval, "
            f"or leave data.eval and data.eval_split out, {hint}"
        )


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
    held = _file(recipe, tokenizer, "eval", _held_out_limit(recipe), say)  # soon read, if all fits
    train = _file(recipe, tokenizer, "train", budget, say)
    if not is_split(data) and _begin_alike(train, held):
        raise DataError(
            f"{data.train}: the text that is held out is the text to train on; name another with "
            "data.eval, or leave it out, and data.eval_fraction of the documents are held out"
        )
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
        "step_tokens": recipe.step_tokens(),
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


def check_same_order(former: RunInfo, recipe: Recipe) -> None:
    """See that a resumed run takes the windows that it began with, before any text is read.

    Args:
        former: what the run was started with.
        recipe: what it would go on with.

    Raises:
        DataError: what a window is, their order, or what a step takes of them has changed.
    """
    data, train = former.recipe["data"], former.recipe["train"]
    _same("data.max_length", data["max_length"], recipe.data.max_length)
    _same("data.seed", data["seed"], recipe.data.seed)
    _same("train.seed", train["seed"], recipe.train.seed)
    if "step_tokens" in former.data:  # older runs do not say it
        step = "the tokens of a step (batch_size x accumulation x max_length x processes)"
        _same(step, former.data["step_tokens"], recipe.step_tokens())


def check_same_text(former: RunInfo, now: dict[str, Any]) -> None:
    """The same of what has been read.

    Args:
        former: what the run was started with.
        now: `stats` of the data that it would go on with.

    Raises:
        DataError: they are other tokens.
    """
    text = (
        "the text, the vocabulary that was trained on it, the budget (train.tokens, train.steps), "
        "or the release of this package"
    )
    before = former.data.get("digests", {}).get("train", now["digests"]["train"])
    _same(text, before, now["digests"]["train"])


def _same(what: str, before: Any, after: Any) -> None:
    if before != after:
        raise DataError(
            f"the run cannot be resumed on other windows of text than it began with: {what} has "
            f"changed ({before} -> {after}). Set it back, or begin another run with "
            "train.output=..."
        )


def _begin_alike(one: TokenFile, other: TokenFile) -> bool:
    """Whether the shorter of two texts is how the longer one begins."""
    shorter = min(len(one), len(other))
    return np.array_equal(one.tokens_N[:shorter], other.tokens_N[:shorter])


def _held_out_limit(recipe: Recipe) -> int:
    wanted = recipe.evaluate.max_examples
    asked = HELD_OUT_TOKENS if wanted is None else wanted * recipe.data.max_length
    return min(asked, HELD_OUT_TOKENS)


def _file(recipe: Recipe, tokenizer: Any, side: Any, limit: int | None, say: Say) -> TokenFile:
    data = recipe.data
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    end = tokenizer.eos_token_id
    parts = {"corpus": identity(data), "side": side, "vocabulary": vocabulary, "end": end}
    # A budget always has its own file, since windows are ordered over all that a file holds.
    place = cache_folder() / "tokens" / f"{side}-{key_of(**parts, limit=limit)}"
    source = source_of(data, side)
    say(f"reading {source}: {side}")
    found = tokenise(lambda: documents(data, side), tokenizer, place, limit, say)
    if len(found) < data.max_length:
        what = "to train on" if side == "train" else "held out"
        if side == "eval" and is_split(data):
            what += " (data.eval_fraction)"
        raise DataError(
            f"{source}: {len(found):,} tokens are {what}, and data.max_length = "
            f"{data.max_length} are needed at least"
        )
    return found
