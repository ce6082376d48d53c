"""Which tokens of a conversation are the assistant's, under any chat template.

A prompt with one answer needs nothing of this: TRL handles it. For several answers TRL wants a
template with {% generation %} marks, which few models have. But most templates only append:
a conversation's text begins with the text of its first messages, and that tells the answers.
"""

from __future__ import annotations

from typing import Any

from velora_torch.training.packing import IGNORED, Tokens
from velora_torch.training.templates import apply_template

Messages = list[dict[str, str]]


def chat_length(tokenizer: Any, messages: Messages) -> int:
    """Return the tokens of a conversation."""
    text = apply_template(tokenizer, messages)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def has_one_answer(messages: Messages) -> bool:
    """Say whether the assistant speaks once only, at the end."""
    return [m["role"] for m in messages].index("assistant") == len(messages) - 1


def learn_answers(tokenizer: Any, messages: Messages) -> Tokens | None:
    """Tokenise a conversation and label what the assistant writes, its end marks included.

    Returns None if the template rewrites earlier messages, or the tokenizer can't tell where in
    the text a token stands: then only a template with marks can help.
    """
    if not tokenizer.is_fast:
        return None
    full = apply_template(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = apply_template(tokenizer, messages[:index], add_generation_prompt=True)
        after = apply_template(tokenizer, messages[: index + 1])
        if not (after.startswith(before) and full.startswith(after)):
            return None
        eos = str(tokenizer.eos_token)
        end = after.rfind(eos, len(before))
        spans.append((len(before), end + len(eos) if end >= 0 else len(after)))
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    starts = [start for start, _ in encoded["offset_mapping"]]
    learnt = [any(low <= start < high for low, high in spans) for start in starts]
    return Tokens(ids, [token if ok else IGNORED for token, ok in zip(ids, learnt, strict=True)])
