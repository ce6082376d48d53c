"""A plain step and a VeLoRA step side by side: same model, batch and machine, interleaved."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from velora_torch.memory.count import StepBytes, measure_step
from velora_torch.model import compressed_layers, restore
from velora_torch.report.results import ComparisonRow, StepSeconds
from velora_torch.training.data import PreparedData
from velora_torch.training.models import compress_for
from velora_torch.training.schema import Recipe


class Variant:
    """One way to take the same training step."""

    def __init__(self, name: str, model: Any, optimizer: Any) -> None:
        self.name, self.model, self.optimizer = name, model, optimizer
        self.seconds: list[float] = []
        self.bytes: StepBytes | None = None
        self.loss: float | None = None

    def step(self, batch: dict[str, Tensor]) -> None:
        """Forward, backward, optimizer: what a trainer does, timed."""
        start = time.perf_counter()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if loss.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def count(self, batch: dict[str, Tensor]) -> None:
        """The same step, its bytes counted."""

        def loss() -> Tensor:
            value: Tensor = self.model(**batch).loss
            self.loss = float(value.detach())
            return value

        self.bytes = measure_step(self.model, loss, self.optimizer)

    def row(self) -> ComparisonRow:
        """The measured row."""
        assert self.bytes is not None
        return ComparisonRow(
            variant=self.name,
            seconds=StepSeconds(
                statistics.median(self.seconds),
                min(self.seconds),
                max(self.seconds),
                len(self.seconds),
            ),
            saved_activation_bytes=self.bytes.saved_activations,
            gradient_bytes=self.bytes.gradients,
            optimizer_bytes=self.bytes.optimizer_state,
            weights_bytes=self.bytes.weights,
            loss=self.loss,
        )


def compare_steps(
    recipe: Recipe,
    model: Any,
    data: PreparedData,
    make_optimizer: Callable[[Any], Any],
    report: Callable[[str], None],
) -> list[ComparisonRow]:
    """Measure plain and VeLoRA steps from the trained weights, on copies of the model.

    Args:
        recipe: says how many repeats, and the batch.
        model: the compressed, trained model; it is not changed.
        data: where the batch comes from.
        make_optimizer: builds the recipe's optimizer for a model.
        report: shows progress.
    """
    assert recipe.compare is not None
    variants = [
        _variant("plain", _plain_copy(model), make_optimizer),
        _variant("VeLoRA", compress_for(recipe, _plain_copy(model)), make_optimizer),
    ]
    batch = _batch(recipe, data, next(model.parameters()).device)
    shape = " x ".join(str(n) for n in next(iter(batch.values())).shape)
    for variant in variants:  # states exist and vectors are drawn after this
        report(f"comparing: a {variant.name} step of {shape}")
        variant.count(batch)
    for repeat in range(recipe.compare.repeats):
        # In turn, and the order changes: the first of a pair pays for what the other left.
        for variant in variants if repeat % 2 == 0 else reversed(variants):
            variant.step(batch)
    return [variant.row() for variant in variants]


def _variant(name: str, model: Any, make_optimizer: Callable[[Any], Any]) -> Variant:
    model.train()
    optimizer = make_optimizer(model)
    return Variant(f"{name} {_optimizer_name(optimizer)}", model, optimizer)


def _optimizer_name(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _plain_copy(model: Any) -> Any:
    duplicate = copy.deepcopy(model)
    return restore(duplicate) if compressed_layers(duplicate) else duplicate


def _batch(recipe: Recipe, data: PreparedData, device: torch.device) -> dict[str, Tensor]:
    assert recipe.compare is not None
    size = recipe.compare.batch_size or recipe.train.batch_size
    rows = [dict(row) for row in _take(data.train, size)]
    if recipe.compare.length is not None:
        rows = [_stretch(row, recipe.compare.length) for row in rows]
    assert data.collator is not None
    return {key: value.to(device) for key, value in data.collator(rows).items()}


def _take(rows: Any, count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        yield rows[index % len(rows)]


def _stretch(row: dict[str, Any], length: int) -> dict[str, Any]:
    """Repeat or cut a row's tokens to a length."""
    times = -(-length // len(row["input_ids"]))
    lists = {k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in row.items()}
    return {key: (value * times)[:length] for key, value in lists.items()}
