"""How good a model is on held-out examples: the likeliest of a closed set of answers."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from velora_torch.report.results import Quality
from velora_torch.training.templates import PromptAnswer

_ROWS = 128
"""Prompts times answers in one forward pass; their logits over a large vocabulary need room."""


@torch.no_grad()
def evaluate_choices(
    model: Any,
    examples: Sequence[PromptAnswer],
    choices: dict[str, list[int]],
    *,
    pad_id: int,
    batch_size: int = 16,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Predict, for each example, the answer with the highest log-likelihood.

    The prompt is read once; every answer is scored on its cached keys and values.

    Args:
        model: a causal language model; evaluated in eval mode, its mode is put back.
        examples: prompts with their right answers, which must be among ``choices``.
        choices: every answer with its tokens (the end-of-sequence token included).
        pad_id: token that fills a batch; never attended to.
        batch_size: prompts in one forward pass.
        report: called with examples done and their total.

    Returns:
        Accuracy in all and by right answer; the loss is the mean over tokens of right answers.
    """
    training = model.training
    model.eval()
    names = list(choices)
    right: dict[str, list[bool]] = defaultdict(list)
    loss_sum, token_count = 0.0, 0
    # Prompts of similar length together: less padding.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    try:
        for start in range(0, len(order), batch_size):
            batch = [examples[i] for i in order[start : start + batch_size]]
            scores = _answer_scores(model, batch, [choices[name] for name in names], pad_id)
            best = scores.argmax(dim=1).tolist()
            for row, example in enumerate(batch):
                right[example.answer].append(names[best[row]] == example.answer)
                truth = names.index(example.answer)
                loss_sum -= float(scores[row, truth])
                token_count += len(choices[example.answer])
            report(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(training)
    hits = [hit for part in right.values() for hit in part]
    return Quality(
        accuracy=sum(hits) / len(hits),
        loss=loss_sum / token_count,
        examples=len(hits),
        choices=names,
        accuracy_by_choice={name: sum(right[name]) / len(right[name]) for name in sorted(right)},
    )


def _answer_scores(
    model: Any, batch: list[PromptAnswer], answers: list[list[int]], pad_id: int
) -> Tensor:
    """Log-likelihood of every answer after every prompt, (B, C)."""
    device = next(model.parameters()).device
    longest = max(len(example.prompt_ids) for example in batch)
    # Padding on the left, so that answers follow their prompts directly.
    prompts = [
        [pad_id] * (longest - len(example.prompt_ids)) + example.prompt_ids for example in batch
    ]
    lengths = torch.tensor([len(example.prompt_ids) for example in batch], device=device)
    ids_BP = torch.tensor(prompts, device=device)
    mask_BP = torch.arange(longest, device=device) >= longest - lengths[:, None]
    positions = (mask_BP.cumsum(1) - 1).clamp(min=0)
    read = model(
        input_ids=ids_BP,
        attention_mask=mask_BP.long(),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    first_BV = F.log_softmax(read.logits[:, -1].float(), dim=-1)

    scores = torch.stack([first_BV[:, answer[0]] for answer in answers], dim=1)
    for group in _groups_of_equal_length(answers, max(1, _ROWS // len(batch))):
        known_CA = torch.tensor([answers[i][:-1] for i in group], device=device)
        next_CA = torch.tensor([answers[i][1:] for i in group], device=device)
        count, size = known_CA.shape
        cache = copy.deepcopy(read.past_key_values)
        cache.batch_repeat_interleave(count)
        mask = torch.cat([mask_BP, mask_BP.new_ones(len(batch), size)], dim=1).long()
        after = lengths[:, None] + torch.arange(size, device=device)
        output = model(
            input_ids=known_CA.repeat(len(batch), 1),
            attention_mask=mask.repeat_interleave(count, dim=0),
            position_ids=after.repeat_interleave(count, dim=0),
            past_key_values=cache,
            use_cache=True,
        )
        log = F.log_softmax(output.logits.float(), dim=-1).unflatten(0, (len(batch), count))
        targets = next_CA.expand(len(batch), -1, -1)[..., None]
        scores[:, group] += log.gather(-1, targets).sum((-2, -1))
    return scores


def _groups_of_equal_length(answers: list[list[int]], most: int) -> Iterator[list[int]]:
    """Places of answers of more than one token, up to `most` of one length together."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        by_length[len(answer)].append(index)
    for length, places in by_length.items():
        if length > 1:
            for start in range(0, len(places), most):
                yield places[start : start + most]
