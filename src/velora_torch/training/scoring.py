"""How good a classifier or a regression is on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from velora_torch.report.results import Quality
from velora_torch.training.precision import precision
from velora_torch.training.schema import Recipe

MAIN = {"text-regression": "pearson"}
"""The score that `evaluate.metric: auto` means; accuracy for the other tasks."""


def evaluate_labels(
    recipe: Recipe,
    model: Any,
    examples: Any,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    classes: Sequence[str] | None,
) -> Quality:
    """Score a model on labelled examples, in the precision that it trains in.

    Args:
        recipe: its task, metric and batch size.
        model: returns logits (B, C), or (B, 1) for a regression; its mode is put back.
        examples: rows with labels.
        collate: makes a batch of rows.
        classes: names of the classes; ``None`` for a regression.
    """
    logits, labels = predict(recipe, model, examples, collate)
    metric: str = recipe.evaluate.metric
    if metric in ("auto", "loss"):
        metric = MAIN.get(recipe.task, "accuracy")
    if classes is None:
        predicted = logits.flatten()
        return Quality(
            loss=float(F.mse_loss(predicted, labels.float())),
            examples=len(labels),
            metric=metric,
            scores=regression_scores(predicted, labels),
        )
    best = logits.argmax(dim=1)
    right = best == labels
    return Quality(
        accuracy=float(right.float().mean()),
        loss=float(F.cross_entropy(logits, labels)),
        examples=len(labels),
        choices=list(classes),
        accuracy_by_choice={
            name: float(right[labels == place].float().mean())
            for place, name in enumerate(classes)
            if bool((labels == place).any())
        },
        metric=metric,
        scores=classification_scores(best, labels, len(classes)),
    )


@torch.no_grad()
def predict(
    recipe: Recipe, model: Any, examples: Any, collate: Callable[[list[Any]], dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Logits in float32, and labels, of all examples in their order; on the CPU."""
    training, size = model.training, recipe.evaluate.batch_size
    device = next(model.parameters()).device
    logits, labels = [], []
    model.eval()
    try:
        for start in range(0, len(examples), size):
            rows = [examples[i] for i in range(start, min(start + size, len(examples)))]
            batch = collate(rows)
            labels.append(batch.pop("labels"))
            with precision(recipe, device.type):
                out = model(**{key: value.to(device) for key, value in batch.items()})
            logits.append(out.logits.float().cpu())
    finally:
        model.train(training)
    return torch.cat(logits), torch.cat(labels)


def classification_scores(best: Tensor, labels: Tensor, classes: int) -> dict[str, float | None]:
    """Accuracy, F1 (of the second of two classes; else the mean over classes), Matthews.

    Args:
        best: predicted classes, (N).
        labels: right classes, (N).
        classes: how many there are.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    truth, found = labels.numpy(), best.numpy()
    average = "binary" if classes == 2 else "macro"
    return {
        "accuracy": float((best == labels).float().mean()),
        "f1": float(f1_score(truth, found, average=average, zero_division=0)),
        "matthews": float(matthews_corrcoef(truth, found)),
    }


def regression_scores(predicted: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Pearson's and Spearman's correlation; None where one side is constant."""
    from scipy.stats import pearsonr, spearmanr

    if predicted.unique().numel() < 2 or labels.unique().numel() < 2:
        return {"pearson": None, "spearman": None}
    x, y = predicted.double().numpy(), labels.double().numpy()
    return {"pearson": float(pearsonr(x, y)[0]), "spearman": float(spearmanr(x, y)[0])}
