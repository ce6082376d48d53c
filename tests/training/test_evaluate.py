"""The likeliest of a closed set of answers, against one whole sequence at a time."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_models
from velora_torch.training import evaluate
from velora_torch.training.evaluate import evaluate_choices
from velora_torch.training.templates import PromptAnswer

CHOICES = {"a": [5, 2], "b": [6, 2], "long": [5, 7, 8, 2], "one": [9], "c": [10, 2], "d": [5, 7, 2]}


@torch.no_grad()
def log_likelihood(model, prompt, answer):
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("rows", [1, 4, 128], ids=["one at a time", "pieces", "all at once"])
@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2], ids=["llama", "gpt2"])
def test_against_whole_sequences(build, rows, monkeypatch):
    monkeypatch.setattr(evaluate, "_ROWS", rows)
    model = build().double().eval()
    prompts = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [4, 4], [12, 3, 9, 9]]
    scores = [
        {name: log_likelihood(model, prompt, ids) for name, ids in CHOICES.items()}
        for prompt in prompts
    ]
    best = [max(own, key=own.get) for own in scores]
    right = [*best[:3], "c" if best[3] != "c" else "d", "a" if best[4] != "a" else "d"]
    examples = [
        PromptAnswer(prompt="", prompt_ids=prompt, answer_ids=CHOICES[name], answer=name)
        for prompt, name in zip(prompts, right, strict=True)
    ]
    quality = evaluate_choices(model, examples, CHOICES, pad_id=0, batch_size=2)
    assert quality.accuracy == 3 / 5
    tokens = sum(len(CHOICES[name]) for name in right)
    wanted = -sum(own[name] for own, name in zip(scores, right, strict=True)) / tokens
    assert quality.loss == pytest.approx(wanted, abs=1e-6)  # log-likelihoods are float32
