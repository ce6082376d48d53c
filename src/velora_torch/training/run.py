"""One run of `velora train`, from a recipe to a trained model, results and a report."""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from velora_torch.model import compressed_layers
from velora_torch.overview import summary
from velora_torch.report.environment import machine_info, version_info
from velora_torch.report.results import (
    ComparisonRow,
    ModelInfo,
    Quality,
    Results,
    RunInfo,
    read_results,
    write_results,
)
from velora_torch.training import budget
from velora_torch.training.data import PreparedData, check_context, prepare
from velora_torch.training.folder import RunFolder
from velora_torch.training.recipe import Recipe

Say = Callable[[str], None]


@dataclass
class Options:
    """How a run is started; not part of what it computes."""

    command: str = ""
    resume: bool = False
    overwrite: bool = False


def run(recipe: Recipe, options: Options, say: Say) -> Results:
    """Train as the recipe says.

    Args:
        recipe: what to do; its sources have been checked.
        options: resume or overwrite.
        say: shows a line of progress.

    Returns:
        What was measured; also written to the run's folder. Its status is "interrupted" where
        Ctrl-C stopped it, and the last checkpoint can be resumed.
    """
    start = time.perf_counter()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    folder = RunFolder(recipe.train.output)
    if options.resume and recipe.memory_budget is not None and folder.recipe.is_file():
        recipe = budget.as_started(recipe, folder.load_recipe())
    checkpoint = folder.check(recipe, options.resume, options.overwrite)

    from velora_torch.training import models

    models.quiet()
    tokenizer = models.load_tokenizer(recipe, say)
    check_context(recipe, models.context(recipe))
    say("preparing the data")
    data = prepare(recipe, tokenizer)
    say(describe_data(data))
    prediction = None
    if recipe.memory_budget is not None:
        recipe, prediction = budget.fit(recipe, data, say)
    say(f"loading {recipe.model}")
    model = _place(models.load_model(recipe, say))
    former = _former_results(folder, checkpoint)
    before = None if former is None else former.before
    prediction = prediction or (None if former is None else former.prediction)
    if recipe.evaluate.before and checkpoint is None:
        before = _evaluate(recipe, model, tokenizer, data, say, "before training")
    models.save_memory(recipe, model)
    info = _describe_model(recipe, model)
    say(str(summary(model)) if recipe.velora else "training without compression")

    if checkpoint is None:
        folder.begin(recipe)
    trained = _train(recipe, model, tokenizer, data, folder, checkpoint, say)
    record = trained.record
    after = None
    compare: list[ComparisonRow] = []
    notes: list[str] = []
    if not record.interrupted:
        trained.trainer.save_model(str(folder.final))
        (folder.final / "training_args.bin").unlink(missing_ok=True)  # a pickle, for resuming
        make_optimizer = _optimizer_maker(trained.trainer)
        trained.trainer.optimizer = trained.trainer.lr_scheduler = None
        gc.collect()
        if recipe.evaluate.after:
            after = _evaluate(recipe, model, tokenizer, data, say, "after training")
        if recipe.compare is not None and data.collator is not None:
            from velora_torch.training.compare import compare_steps

            compare = compare_steps(recipe, model, data, make_optimizer, say)
    else:
        notes.append("interrupted by the user; resume with --resume")
    results = Results(
        run=RunInfo(
            name=Path(recipe.train.output).name,
            status="interrupted" if record.interrupted else "finished",
            command=options.command,
            started=started,
            seconds=time.perf_counter() - start,
            recipe=recipe.model_dump(mode="json"),
            versions=version_info(),
            machine=machine_info(next(model.parameters()).device),
        ),
        model=info,
        history=[*(former.history if former else []), *record.history],
        evaluations=[*(former.evaluations if former else []), *record.evaluations],
        before=before,
        after=after,
        memory=record.memory,
        compare=compare,
        notes=notes,
        prediction=prediction,
    )
    _write(results, folder)
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


def describe_data(data: PreparedData) -> str:
    """One line about the data."""
    stats = data.stats
    return (
        f"{stats['train_examples']:,} training examples, {stats['eval_examples']:,} held out; "
        f"{stats['train_tokens']:,} tokens, the longest example has {stats['longest']}"
    )


@dataclass
class _Trained:
    trainer: Any
    record: Any


def _train(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    folder: RunFolder,
    checkpoint: Path | None,
    say: Say,
) -> _Trained:
    from velora_torch.training.trainer import Record, build_trainer, interruptible

    record = Record()
    trainer = build_trainer(recipe, model, tokenizer, data, folder.path, record, say)
    with interruptible(record, say):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _Trained(trainer, record)


def _evaluate(
    recipe: Recipe, model: Any, tokenizer: Any, data: PreparedData, say: Say, when: str
) -> Quality | None:
    """Quality on held-out examples: accuracy where the answers are choices, else the loss."""
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

    limit = recipe.evaluate.max_examples
    held_out = data.eval if limit is None else data.eval.select(range(min(limit, len(data.eval))))
    say(f"evaluating {when}: {len(held_out)} held-out rows")
    plain = recipe.model_copy(deep=True)
    plain.train.tensorboard = False
    trainer = build_trainer(
        plain, model, tokenizer, data, Path(recipe.train.output), Record(), lambda line: None
    )
    metrics = trainer.evaluate(held_out if data.format != "chat" else None)
    say(f"{when}: loss {metrics['eval_loss']:.4f}")
    return Quality(loss=metrics["eval_loss"], examples=len(held_out))


def _place(model: Any) -> Any:
    import torch

    if torch.cuda.is_available() and not getattr(model, "is_quantized", False):
        return model.to("cuda")
    return model


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


def _optimizer_maker(trainer: Any) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        kind, settings = type(trainer).get_optimizer_cls_and_kwargs(trainer.args, model)
        return kind([p for p in model.parameters() if p.requires_grad], **settings)

    return make


def _write(results: Results, folder: RunFolder) -> None:
    from velora_torch.report.page import write_report

    write_results(results, folder.results)
    write_report(results, folder.report)
