"""What a row of `bench pretrain` keeps besides its perplexity: the curve, and the whole peak."""

from __future__ import annotations

import math
from typing import Any

from velora_torch.report.results import Results
from velora_torch.training.perplexity import perplexity_of
from velora_torch.training.schema import Recipe


def details(recipe: Recipe, results: Results) -> dict[str, Any]:
    """Held-out perplexity over the run, and the largest moment of a training step.

    Args:
        recipe: what has run.
        results: its results.

    Returns:
        `curve`: a list of {tokens, seconds, perplexity}; `tokens`: in all; `peak_bytes`; `text`:
        digests of what was read, {"train", "eval"}.
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
            "perplexity": _perplexity(point.loss),
        }
        for point in results.evaluations
    ]
    return {
        "curve": curve,
        "tokens": budget,
        "peak_bytes": peak_bytes(recipe),
        "text": results.run.data["digests"],
    }


def _perplexity(loss: float | None) -> float | None:
    """None where there is none that JSON can hold."""
    value = math.inf if loss is None else perplexity_of(loss)
    return value if math.isfinite(value) else None


def peak_bytes(recipe: Recipe) -> int:
    """The largest number of bytes that a training step of a recipe holds at one time.

    Weights, gradients, optimizer state, activations and temporary tensors, of two real steps under
    the tracker of `velora_torch.memory`; without what the process itself needs.
    """
    from velora_torch.memory.simulator.steps import track
    from velora_torch.training.assemble import assemble

    assembled = assemble(recipe, lambda line: None)
    model, batch = assembled.model.train(), assembled.make_batch()
    optimizer = assembled.make_optimizer()
    plain = getattr(optimizer, "optimizer", optimizer)
    trace = track(model, plain, lambda: assembled.loss(batch), list(batch.values()))
    return max(trace.segments().values())
