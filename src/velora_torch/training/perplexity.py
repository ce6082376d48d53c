"""What a language model forgets: its perplexity on general text, before and after training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from velora_torch.paths import as_path
from velora_torch.training.assets import AssetError
from velora_torch.training.packaged.prose import PROSE, check_prose, load_prose
from velora_torch.training.sources import DataError

LENGTH = 256
"""Tokens of a window; windows do not overlap."""
WINDOWS = 32
"""So many windows at most, evenly spread over the text."""


def check_general_text(name: str) -> None:
    """Raise `DataError` for a text that is not there."""
    if name in PROSE:
        try:
            check_prose(name)
        except AssetError as error:
            raise DataError(f"evaluate.perplexity: {error}") from None
    elif not as_path(name).is_file():
        known = ", ".join(PROSE)
        raise DataError(f"evaluate.perplexity: no file {name!r}; packaged texts: {known}")


def windows(name: str, tokenizer: Any) -> torch.Tensor:
    """Tokens of a text in windows, (N, LENGTH)."""
    texts = load_prose(name) if name in PROSE else [_read(as_path(name))]
    ids = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    count = len(ids) // LENGTH
    if not count:
        raise DataError(
            f"evaluate.perplexity: {name!r} has {len(ids)} tokens, and {LENGTH} are needed at least"
        )
    rows = torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
    places = torch.linspace(0, count - 1, min(count, WINDOWS)).round().long()
    return rows[places]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"evaluate.perplexity: {path} is not UTF-8 text") from None


@torch.no_grad()
def perplexity(model: Any, ids_NL: torch.Tensor, batch_size: int = 4) -> float:
    """exp of the mean negative log-likelihood of a token, given its window.

    Args:
        model: a causal language model; its mode is put back.
        ids_NL: tokens in windows, (N, L).
        batch_size: windows in one forward pass.
    """
    training = model.training
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    model.eval()
    try:
        for part in ids_NL.to(device).split(batch_size):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            targets = part[:, 1:].flatten()
            total += float(F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
            tokens += targets.numel()
    finally:
        model.train(training)
    return perplexity_of(total / tokens)


def perplexity_of(loss: float) -> float:
    """exp of a mean loss per token; infinite where it is too large for a number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
