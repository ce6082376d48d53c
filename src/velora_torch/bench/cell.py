"""One cell of a bench: its recipe trained and scored in a folder that is removed afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from velora_torch.bench.catalogue import BENCHES
from velora_torch.bench.grid import Cell, Row
from velora_torch.memory.freed import TargetWarning
from velora_torch.report.results import Quality, Results
from velora_torch.training.precision import products_of
from velora_torch.training.recipe import Recipe


def run_cell(cell: Cell, command: str, scratch: Path) -> Row:
    """Train and score one cell.

    Args:
        cell: what to run.
        command: what the user has typed, for the record.
        scratch: folder for a temporary folder.

    Returns:
        What was measured.

    Raises:
        KeyboardInterrupt: the run was interrupted.
        ValueError: the run has ended without a score.
    """
    from velora_torch.training.run import Options, run

    start = time.perf_counter()
    scale = BENCHES[cell.bench].scales[cell.scale]
    measure = scale.measure
    with tempfile.TemporaryDirectory(dir=scratch, prefix="cell-") as folder:
        recipe = recipe_of(cell, folder)
        options = Options(command=command, overwrite=True, report=False)
        with _quiet():
            results = run(recipe, options, lambda line: None)
        if results.run.status == "interrupted":
            raise KeyboardInterrupt
        gc.collect()  # the trainer and its model hold each other; what comes next needs the room
        with products_of(recipe):
            row = row_of(cell, results, command, {} if measure is None else measure(recipe))
            if scale.details is not None:
                with _quiet():
                    row.details = dict(scale.details(recipe, results))
    row.seconds = time.perf_counter() - start
    return row


def recipe_of(cell: Cell, output: str | Path) -> Recipe:
    """The cell's recipe, which writes into a folder."""
    train = {**cell.recipe["train"], "output": str(output)}
    return Recipe.model_validate({**cell.recipe, "train": train})


def row_of(
    cell: Cell, results: Results, command: str, measured: Mapping[str, float] | None = None
) -> Row:
    """What a run has measured, as a row.

    Args:
        cell: what has run.
        results: what the run says.
        command: what the user has typed.
        measured: scores from elsewhere, the one that counts first.

    Raises:
        ValueError: there is no finite score.
    """
    after, before = results.after or Quality(), results.before
    scores = {**after.scores, **(measured or {})}
    metric = next(iter(measured)) if measured else after.metric
    score = scores.get(metric, after.score)
    if score is None or not math.isfinite(score):
        raise ValueError(f"the run has ended without a score ({_last_loss(results)})")
    memory = {}
    if results.memory is not None:
        memory = {**dataclasses.asdict(results.memory), "total": results.memory.total}
    logged = [point.seconds for point in results.history if point.seconds is not None]
    return Row(
        bench=cell.bench,
        scale=cell.scale,
        task=cell.task,
        variant=cell.variant,
        seed=cell.seed,
        fingerprint=cell.fingerprint,
        metric=metric,
        score=score,
        scores={name: _finite(value) for name, value in scores.items()},
        loss=_finite(after.loss),
        perplexity=_finite(after.perplexity),
        perplexity_before=None if before is None else _finite(before.perplexity),
        score_before=None if before is None else _finite(before.score),
        trainable_parameters=results.model.trainable_parameters,
        memory=memory,
        seconds=results.run.seconds,
        train_seconds=logged[-1] if logged else None,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        recipe=dict(cell.recipe),
        machine=dataclasses.asdict(results.run.machine),
        versions=results.run.versions,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without advice: a protocol says what is compressed, and with which optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TargetWarning)
        warnings.simplefilter("ignore", FutureWarning)  # galore_torch's AdamW, of itself
        yield


def _last_loss(results: Results) -> str:
    losses = [point.loss for point in results.history]
    return f"last training loss: {losses[-1]}" if losses else "no training step was logged"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
