"""What `velora analyze` does: train a recipe plainly, and at some of its steps measure all layers.

What is measured at step s is the training batch from which the recipe's trainer computes update
s + 1: its own forward and backward pass, with dropout and whatever else training has.
"""

from __future__ import annotations

import datetime
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from velora_torch.analysis.capture import Capture, Captured
from velora_torch.analysis.choices import LayerVectors, choices
from velora_torch.analysis.layers import Layers, layers_of
from velora_torch.analysis.results import Analysis, LayerInfo, write_analysis
from velora_torch.analysis.rows import Table
from velora_torch.analysis.similarity import THRESHOLDS
from velora_torch.analysis.summary import markdown, without_gradients
from velora_torch.atomic import write_whole
from velora_torch.report.environment import machine_info, version_info
from velora_torch.report.quantities import format_seconds
from velora_torch.report.results import RunInfo
from velora_torch.training.precision import products_of
from velora_torch.training.schema import Recipe

Say = Callable[[str], None]
JSON, MARKDOWN = "analysis.json", "analysis.md"


class AnalysisError(ValueError):
    """An analysis can't be made as asked."""


@dataclass(frozen=True)
class Request:
    """What a user asks of `velora analyze`, besides the recipe."""

    output: Path
    """Folder to write into; must not exist yet, or be empty."""
    steps: tuple[int, ...] = (0,)
    """Optimizer steps before each measurement, rising."""
    groups: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Numbers of groups, rising."""
    tokens: int = 256
    """The most that are sampled from a layer in a step."""
    command: str = ""

    def check(self, recipe: Recipe) -> None:
        """Refuse what cannot work, before any work.

        Raises:
            AnalysisError: says what is wrong and what to write instead.
        """
        for option, numbers, least in (("steps", self.steps, 0), ("groups", self.groups, 1)):
            shown = ",".join(map(str, numbers))
            if not numbers or numbers[0] < least:
                raise AnalysisError(f"--{option} {shown}: numbers from {least} on are needed")
            if any(b <= a for a, b in itertools.pairwise(numbers)):
                raise AnalysisError(f"--{option} {shown}: the numbers must rise")
        if self.tokens < 2:
            raise AnalysisError(f"--tokens must be at least 2, not {self.tokens}")
        if (steps := recipe.steps()) is not None:
            self.check_length(steps)
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise AnalysisError(f"{self.output} is there already; choose another with --output")
        out = self.output.absolute()
        place = next(path for path in (out, *out.parents) if path.exists())
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise AnalysisError(f"{self.output}: nothing can be written into {place}")
        if recipe.method == "coefficients":
            raise AnalysisError(
                "method: coefficients trains nothing without compression, and an analysis trains "
                "without; set method=full"
            )

    def check_length(self, total: int) -> None:
        """Refuse steps that a training of `total` steps has no batch for."""
        if self.steps[-1] >= total:
            raise AnalysisError(
                f"--steps {self.steps[-1]}: the recipe trains {total} steps, so the last that has "
                f"a batch to measure is {total - 1}; train more with train.steps=..."
            )


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers with commas between them.

    Raises:
        AnalysisError: it is something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise AnalysisError(
            f"--{option} {text!r}: expected whole numbers with commas between them, such as 0,50"
        ) from None


def analyze(recipe: Recipe, request: Request, say: Say) -> Analysis:
    """Measure a recipe's layers, and write JSON, plots and a summary.

    Args:
        recipe: model, data and training; trained without its compression, whose `targets`, `seed`
            and `running_decay` say what is looked at. Its sources have been checked.
        request: where, when, how finely.
        say: shows a line of progress.

    Raises:
        AnalysisError: it cannot be made as asked. Nothing has been written.
    """
    request.check(recipe)
    with products_of(recipe):
        return _analyze(recipe, request, say)


def _analyze(recipe: Recipe, request: Request, say: Say) -> Analysis:
    start = time.perf_counter()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="velora-analyze-") as scratch:
        measured = _measure(recipe, plain(recipe, scratch), request, say)
    table, layers = measured.table, measured.layers
    analysis = Analysis(
        run=RunInfo(
            name=request.output.name,
            status="finished",
            command=request.command,
            started=started,
            seconds=round(time.perf_counter() - start, 1),
            recipe=recipe.model_dump(mode="json"),
            versions=version_info(),
            machine=machine_info(measured.device),
        ),
        steps=list(request.steps),
        groups=list(request.groups),
        tokens=request.tokens,
        thresholds=list(THRESHOLDS),
        layers=[
            LayerInfo(layer.name, layer.kind, layer.features, layer.outputs)
            for layer in layers.found.values()
        ],
        skipped=layers.skipped,
        samples=table.samples,
        ranks=table.ranks,
        projections=table.projections,
        curves=table.curves(),
    )
    write(analysis, request.output)
    return analysis


def write(analysis: Analysis, folder: Path) -> None:
    """Write analysis.json, the plots, and analysis.md last."""
    from velora_torch.analysis.plots import draw_all

    folder.mkdir(parents=True, exist_ok=True)
    write_analysis(analysis, folder / JSON)
    pictures = draw_all(analysis, folder)
    write_whole(folder / MARKDOWN, markdown(analysis, pictures))


def plain(recipe: Recipe, output: str) -> Recipe:
    """The same training without compression, and without what only saves memory or writes files."""
    train = recipe.train.model_copy(
        update={
            "output": output,
            "gradient_checkpointing": False,
            "recompute": False,
            "chunked_loss": False,
            "tensorboard": False,
            "eval_every": None,
            "save_every": None,
        }
    )
    without = {"velora": None, "compare": None, "memory_budget": None, "train": train}
    return recipe.model_copy(update=without)


@dataclass
class _Measured:
    table: Table
    layers: Layers
    device: Any


def _measure(recipe: Recipe, trained: Recipe, request: Request, say: Say) -> _Measured:
    """Train up to the last of the steps, and fill the table on the way."""
    from velora_torch.analysis.pauses import Pauses
    from velora_torch.training.assemble import assemble
    from velora_torch.training.trainer import Record, build_trainer

    say(f"loading {recipe.model} and its data")
    ready = assemble(trained, say)
    layers = layers_of(ready.model, recipe, request.groups)
    for what, reason in list(layers.skipped.items())[:8]:
        say(f"skipped: {what}: {reason}")
    if len(layers.skipped) > 8:
        say(f"skipped: {len(layers.skipped) - 8} more")
    section = recipe.velora
    seed, decay = (0, 0.9) if section is None else (section.seed, section.running_decay)
    vectors = {name: LayerVectors(name, seed, decay) for name in layers.found}
    table = Table(choices(request.steps), seed)
    say(_plan(request, layers))
    now = 0

    def on_sample(captured: Captured) -> None:
        layer, own = layers.found[captured.name], vectors[captured.name]
        own.see_tokens(captured.x_TD, layer.sizes)
        if now in request.steps:
            table.add(now, layer, captured, own)

    capture = Capture(
        ready.model,
        {name: layer.module for name, layer in layers.found.items()},
        request.tokens,
        recipe.train.seed,
        on_mean=lambda name, mean_D: vectors[name].see_mean(mean_D),
        on_sample=on_sample,
    )

    def begin(step: int) -> None:
        nonlocal now
        now = step
        # Singular vectors are fixed in the first step, whether it is measured or not.
        sample = step == 0 or step in request.steps
        capture.begin(step, trained.train.accumulation, sample)

    def finish(step: int) -> None:
        capture.finish()
        if step in request.steps:
            measured = sum(sample.step == step for sample in table.samples)
            say(f"step {step}: {measured} layers measured, {format_seconds(clock())}")
            if zero := without_gradients(table.samples, step, step == request.steps[-1]):
                say(zero)

    begun = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - begun

    trainer = build_trainer(
        trained,
        ready.model,
        ready.tokenizer,
        ready.data,
        Path(trained.train.output),
        Record(),
        lambda line: None,
    )
    trainer.add_callback(Pauses(request.steps[-1], request.check_length, begin, finish))
    with capture:
        trainer.train()
    _check_found(table, request.steps)
    return _Measured(table, layers, next(ready.model.parameters()).device)


def _plan(request: Request, layers: Layers) -> str:
    steps = ", ".join(map(str, request.steps))
    return (
        f"{len(layers.found)} layers, up to {request.tokens} tokens of each at "
        f"step{'s' if len(request.steps) > 1 else ''} {steps}"
    )


def _check_found(table: Table, steps: Sequence[int]) -> None:
    seen = {sample.step for sample in table.samples}
    for step in steps:
        if step not in seen:
            raise AnalysisError(f"no layer got a gradient at step {step}")
