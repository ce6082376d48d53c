"""What a row of `bench pretrain` keeps besides its perplexity: the curve, and the whole peak."""

from __future__ import annotations

import math
from typing import Any

from velora_torch.report.results import Results
from velora_torch.training.schema import Recipe


def details(recipe: Recipe, results: Results) -> dict[str, Any]:
    """Held-out perplexity over the run, and the largest moment of a training step.

    Args:
        recipe: what has run.
        results: its results.

    Returns:
        `curve`: a list of {tokens, seconds, perplexity}; `tokens`: in all; `peak_bytes`.
    """
    steps = recipe.steps()
    budget = recipe.token_budget()
    assert steps is not None
    assert budget is not None
    per_step = budget // steps
    curve = [
        {
            "tokens": point.step * per_step,
            "seconds": point.seconds,
            "perplexity": None if point.loss is None else math.exp(min(point.loss, 700.0)),
        }
        for point in results.evaluations
    ]
    return {"curve": curve, "tokens": budget, "peak_bytes": peak_bytes(recipe)}


def peak_bytes(recipe: Recipe) -> int:
    """The largest number of bytes that a training step of a recipe holds at one time.

    Weights, gradients, optimizer state, activations and temporary tensors, of two real steps under
    the tracker of `velora_torch.memory`; without what the process itself needs.
    """
    from velora_torch.memory.simulator.steps import track
    from velora_torch.training.assemble import assemble

    assembled = assemble(recipe, lambda line: None)
    model, data = assembled.model.train(), assembled.data
    optimizer = assembled.make_optimizer()
    rows = [data.train[index] for index in range(recipe.train.batch_size)]
    assert data.collator is not None
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in data.collator(rows).items()}
    plain = getattr(optimizer, "optimizer", optimizer)
    trace = track(model, plain, lambda: model(**batch).loss, list(batch.values()))
    return max(trace.segments().values())
