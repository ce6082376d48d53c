"""One run of `velora train`, from a recipe to a trained model, results and a report."""

from __future__ import annotations

import datetime
import gc
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from velora_torch.model import compressed_layers
from velora_torch.overview import summary
from velora_torch.report.environment import machine_info, version_info
from velora_torch.report.results import (
    Evaluation,
    HistoryPoint,
    ModelInfo,
    Quality,
    Results,
    RunInfo,
    read_results,
    write_results,
)
from velora_torch.training import budget, processes, strategies
from velora_torch.training.assemble import make_optimizer, place, prepare_data
from velora_torch.training.data import PreparedData
from velora_torch.training.folder import RunFolder
from velora_torch.training.output import check_output
from velora_torch.training.precision import products_of, slow_type
from velora_torch.training.pretraining.prepare import check_same_order, check_same_text
from velora_torch.training.recipe import Recipe
from velora_torch.training.saving import save_final

Say = Callable[[str], None]
Point = TypeVar("Point", HistoryPoint, Evaluation)


@dataclass
class Options:
    """How a run is started; not part of what it computes."""

    command: str = ""
    resume: bool = False
    overwrite: bool = False
    report: bool = True
    """Write report.html."""
    strategy: strategies.Strategy = "ddp"
    """How several processes share the model."""
    tensor_parallel: int = 1
    """Processes that split each layer and take the same examples."""


def run(recipe: Recipe, options: Options, say: Say) -> Results:
    """Train as the recipe says.

    Args:
        recipe: what to do; its sources have been checked.
        options: resume or overwrite.
        say: shows a line of progress.

    Returns:
        What was measured; also written to the run's folder. Its status is "interrupted" where
        Ctrl-C or SIGTERM stopped it, and the last checkpoint can be resumed.
    """
    check_output(recipe.train.output, options.resume)
    strategies.check_trained(options.strategy, recipe)
    strategies.check_split(options.tensor_parallel, options.strategy, recipe)
    folder = RunFolder(recipe.train.output)
    with (
        products_of(recipe),
        processes.joined(),
        processes.alike(options.tensor_parallel),
        folder.alone(),
    ):
        processes.wait()  # until the first one has the folder
        return _run(recipe, options, say if processes.is_first() else _silent, folder)


def _silent(line: str) -> None:
    """Say nothing: the first process speaks for all."""


def _run(recipe: Recipe, options: Options, say: Say, folder: RunFolder) -> Results:
    start = time.perf_counter()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if options.resume and recipe.memory_budget is not None and folder.recipe.is_file():
        recipe = budget.as_started(recipe, folder.load_recipe())
    checkpoint = folder.check(options.resume, options.overwrite, say)
    former = _former_results(folder, checkpoint)
    if former is not None and recipe.task == "pretrain":
        check_same_order(former.run, recipe)

    from velora_torch.training import models
    from velora_torch.training.trainer import Record

    models.quiet()
    if (slow := slow_type(recipe)) is not None:
        name = str(slow).removeprefix("torch.")
        say(f"this CPU has no {name} instructions: products are computed in float32 and rounded")
    say("preparing the data")
    with processes.first_alone():
        tokenizer, data = prepare_data(recipe, say)
    say(describe_data(data))
    if former is not None and recipe.task == "pretrain":
        check_same_text(former.run, data.stats)
    prediction = None
    if recipe.memory_budget is not None:
        recipe, prediction = budget.fit(recipe, data, say, options.strategy)
    say(f"loading {recipe.model}")
    with processes.first_alone():
        model = place(models.load_model(recipe, say, data))
    if options.tensor_parallel > 1:
        from velora_torch.integrations.tensor_parallel import check_plan

        check_plan(model, options.tensor_parallel)
    before = None if former is None else former.before
    prediction = prediction or (None if former is None else former.prediction)
    if recipe.evaluate.before and checkpoint is None:
        before = _evaluate(recipe, model, tokenizer, data, say, "before training")
    models.save_memory(recipe, model)
    info = _describe_model(recipe, model)
    say(str(summary(model)) if recipe.velora else "training without compression")

    if checkpoint is None and processes.is_first():
        folder.begin(recipe)
    processes.wait()
    record = Record()
    results = Results(
        run=RunInfo(
            name=Path(recipe.train.output).name,
            status="interrupted",
            command=options.command,
            started=started,
            recipe=recipe.model_dump(mode="json"),
            data=data.stats,
            versions=version_info(),
            machine=machine_info(next(model.parameters()).device),
        ),
        model=info,
        before=before,
        memory=record.memory,
        prediction=prediction,
    )

    def keep(trainer: Any) -> None:
        """Bring the results up to now, so that a run that is killed has them."""
        results.run.seconds = time.perf_counter() - start
        results.history, results.evaluations = record.history, record.evaluations
        if former is not None:
            results.history = [*former.history, *_later(former, record.history)]
            results.evaluations = [*former.evaluations, *_later(former, record.evaluations)]
        results.notes = trainer.safety_notes()
        if processes.is_first():
            write_results(results, folder.results)

    trainer = _train(recipe, model, tokenizer, data, folder, checkpoint, record, keep, options, say)
    results.run.signal = record.signal
    if record.signal is None:
        trainer.optimizer = trainer.lr_scheduler = None
        gc.collect()
        if recipe.train.save_final:
            save_final(recipe, trainer, folder.final)
        if recipe.evaluate.after:
            results.after = _evaluate(recipe, model, tokenizer, data, say, "after training")
        alone = processes.count() == 1
        if recipe.compare is not None and not alone:
            say("compare is left out: plain and VeLoRA steps are compared by one process alone")
        elif recipe.compare is not None and data.collator is not None:
            from velora_torch.training.compare import compare_steps

            maker = partial(make_optimizer, recipe, tokenizer=tokenizer, data=data)
            results.compare = compare_steps(recipe, model, data, maker, say)
        results.run.status = "finished"
    keep(trainer)
    if record.signal is not None:
        name = signal.Signals(record.signal).name
        results.notes.append(f"interrupted by {name}; resume with --resume")
    if processes.is_first():
        _write(results, folder, options.report)
    return results


def _former_results(folder: RunFolder, checkpoint: Path | None) -> Results | None:
    """What the interrupted part of a resumed run had measured up to its checkpoint."""
    if checkpoint is None or not folder.results.is_file():
        return None
    former = read_results(folder.results)
    last = int(checkpoint.name.partition("-")[2])
    former.history = [point for point in former.history if point.step <= last]
    former.evaluations = [point for point in former.evaluations if point.step <= last]
    return former


def _later(former: Results, points: list[Point]) -> list[Point]:
    """What a resumed run has seen, its seconds counted on from those of its former part."""
    known = [p.seconds for p in former.history] + [p.seconds for p in former.evaluations]
    passed = max((seconds or 0.0 for seconds in known), default=0.0)
    return [replace(p, seconds=passed + (p.seconds or 0.0)) for p in points]


def describe_data(data: PreparedData) -> str:
    """One line about the data."""
    stats = data.stats
    if data.format == "tokens":
        return (
            f"{stats['train_tokens']:,} tokens to train on, {stats['passes']:.2f} passes over the "
            f"text; {stats['eval_tokens']:,} held out; a vocabulary of {stats['vocabulary']:,}"
        )
    if data.format == "images":
        return (
            f"{stats['train_examples']:,} training images, {stats['eval_examples']:,} held out; "
            f"{len(data.classes or ())} classes"
        )
    return (
        f"{stats['train_examples']:,} training examples, {stats['eval_examples']:,} held out; "
        f"{stats['train_tokens']:,} tokens, the longest example has {stats['longest']}"
    )


def _train(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    folder: RunFolder,
    checkpoint: Path | None,
    record: Any,
    keep: Callable[[Any], None],
    options: Options,
    say: Say,
) -> Any:
    """The trainer, after its training."""
    from velora_torch.training.interrupts import agree, interruptible
    from velora_torch.training.out_of_memory import OutOfMemoryError, explained, what_fits
    from velora_torch.training.trainer import build_trainer

    trainer = build_trainer(
        recipe,
        model,
        tokenizer,
        data,
        folder.path,
        record,
        say,
        strategy=options.strategy,
        tensor_parallel=options.tensor_parallel,
    )
    trainer.before_save = partial(keep, trainer)
    try:
        with interruptible(record), explained(trainer):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except OutOfMemoryError as error:
        fits = what_fits(recipe, data, options.strategy, split=options.tensor_parallel > 1)
        raise OutOfMemoryError(f"{error}\n{fits}") from None
    agree(record)  # a signal may have come after the last step, to some processes alone
    return trainer


def _evaluate(
    recipe: Recipe, model: Any, tokenizer: Any, data: PreparedData, say: Say, when: str
) -> Quality | None:
    """Quality on held-out examples, and a language model's perplexity on general text."""
    quality = _score(recipe, model, tokenizer, data, say, when)
    if recipe.evaluate.perplexity is not None:
        from velora_torch.training.perplexity import perplexity, windows

        text = windows(recipe.evaluate.perplexity, tokenizer)
        quality = quality or Quality()
        quality.perplexity = perplexity(model, text)
        say(f"{when}: perplexity on general text {quality.perplexity:.3f}")
    return quality


def _score(
    recipe: Recipe, model: Any, tokenizer: Any, data: PreparedData, say: Say, when: str
) -> Quality | None:
    """Accuracy where the answers are choices or classes, a correlation, or the loss."""
    if data.format in ("labelled", "images"):
        if data.eval is None:
            return None
        from velora_torch.training.scoring import evaluate_labels

        say(f"evaluating {when}: {len(data.eval)} held-out examples")
        assert data.collator is not None
        quality = evaluate_labels(recipe, model, data.eval, data.collator, data.classes)
        shown = "undefined" if quality.score is None else f"{quality.score:.3f}"
        say(f"{when}: {quality.metric} {shown}, loss {quality.loss:.4f}")
        return quality
    if data.choices is not None:
        from velora_torch.training.evaluate import evaluate_choices

        examples = data.eval_examples[: recipe.evaluate.max_examples]
        say(f"evaluating {when}: {len(examples)} held-out examples")
        quality = evaluate_choices(
            model,
            examples,
            data.choices,
            pad_id=tokenizer.pad_token_id,
            batch_size=recipe.evaluate.batch_size,
        )
        say(f"{when}: accuracy {quality.accuracy:.1%}, loss {quality.loss:.4f}")
        return quality
    if data.eval is None:
        return None
    from velora_torch.training.trainer import Record, build_trainer

    held_out, limit = data.eval, recipe.evaluate.max_examples
    if limit is not None and data.format != "tokens":  # of windows no more are prepared
        held_out = data.eval.select(range(min(limit, len(data.eval))))
    say(f"evaluating {when}: {len(held_out)} held-out rows")
    plain = recipe.model_copy(deep=True)
    plain.train.tensorboard = False
    trainer = build_trainer(
        plain, model, tokenizer, data, Path(recipe.train.output), Record(), lambda line: None
    )
    with processes.not_taken(model):
        metrics = trainer.evaluate(held_out if data.format != "chat" else None)
    loss = metrics["eval_loss"]
    if recipe.task == "pretrain":
        from velora_torch.training.perplexity import perplexity_of

        own = perplexity_of(loss)
        say(f"{when}: perplexity {own:.3f}, loss {loss:.4f}")
        scores: dict[str, float | None] = {"perplexity": own}
        return Quality(loss=loss, examples=len(held_out), metric="perplexity", scores=scores)
    say(f"{when}: loss {loss:.4f}")
    return Quality(loss=loss, examples=len(held_out))


def _describe_model(recipe: Recipe, model: Any) -> ModelInfo:
    overview = summary(model)
    compressed = {
        name: f"{layer.features} features in {layer.groups} groups of {layer.size}"
        for name, layer in overview.compressed.items()
    }
    # A frozen weight that coefficients train counts as trained; the coefficients do not.
    layers = overview.compressed.values()
    inside = sum(layer.weights for layer in layers if layer.gradient == "factored")
    factors = {id(layer.coef) for layer in compressed_layers(model).values()}
    own = [p for p in model.parameters() if id(p) not in factors]
    trainable = sum(p.numel() for p in own if p.requires_grad)
    return ModelInfo(
        name=recipe.model,
        parameters=sum(p.numel() for p in own),
        trainable_parameters=trainable + inside,
        compressed_layers=compressed,
        exact_layers=overview.exact,
    )


def _write(results: Results, folder: RunFolder, report: bool) -> None:
    from velora_torch.report.page import write_report

    write_results(results, folder.results)
    if report:
        write_report(results, folder.report)
