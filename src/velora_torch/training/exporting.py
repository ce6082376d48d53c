"""`velora export`: a run's trained model as a plain checkpoint or a LoRA adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from velora_torch.checkpoint import JSON_FILE, TENSOR_FILE, load_state
from velora_torch.export import export_lora
from velora_torch.integrations.sharded_checkpoint import FOLDER as SHARDS
from velora_torch.integrations.sharded_checkpoint import has_shards, whole_weights
from velora_torch.shards import check_shards
from velora_torch.training.assemble import prepare_data
from velora_torch.training.data import PreparedData
from velora_torch.training.folder import FolderError, RunFolder
from velora_torch.training.manifest import MANIFEST
from velora_torch.training.recipe import Recipe
from velora_torch.training.schema import PEFT_METHODS
from velora_torch.training.whole_checkpoints import SAFETY_FILE

RESUMING = (
    JSON_FILE,
    TENSOR_FILE,
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    SHARDS,
    "trainer_state.json",
    "training_args.bin",
    MANIFEST,
    SAFETY_FILE,
)
"""What a checkpoint has for resuming, and a plain model does not."""


def export_run(run: Path, to: Path, lora: bool) -> str:
    """Write a run's newest model to a new folder.

    Args:
        run: folder of a finished or interrupted run.
        to: folder to write; must not exist.
        lora: a PEFT adapter instead of whole weights.

    Returns:
        A line that says what was written.

    Raises:
        FolderError: the run has no model, or ``to`` exists.
        ValueError: the run cannot be written as an adapter (see `export_lora`).
    """
    folder = RunFolder(run)
    recipe = folder.load_recipe()
    if to.exists():
        raise FolderError(f"{to} exists; choose a new folder")
    source = folder.newest_model()
    check_shards(source)
    _check_links(source, run)
    merged = recipe.task == "pretrain" and source == folder.final  # whose base nobody has
    adapter = recipe.method in PEFT_METHODS or recipe.method == "coefficients"
    if recipe.task == "pretrain" and adapter and lora:
        raise FolderError(
            f"{run} started from random weights, which nobody else has: an adapter has no base to "
            f"lie on. Export it without --lora"
        )
    adapter = adapter and not merged
    pending = recipe.method == "coefficients" and source != folder.final
    in_shards = has_shards(source)
    if lora and in_shards:
        raise FolderError(
            f"{source} is in shards, of which no adapter is made: finish the run with --resume, or "
            f"export it without --lora"
        )
    if lora and (pending or not adapter):
        export_lora(_load_compressed(recipe, source), to)
    elif pending:
        raise FolderError(
            f"{run} was interrupted, and its coefficients are on a frozen base: export them as an "
            f"adapter with --lora, or finish the run with --resume"
        )
    elif adapter and not lora:
        _merge(recipe, source, to)
    else:
        shutil.copytree(source, to, ignore=shutil.ignore_patterns(*RESUMING))
        if in_shards:
            save_file(whole_weights(source), to / "model.safetensors", {"format": "pt"})
    kind = "a LoRA adapter" if lora else "a plain checkpoint"
    return f"wrote {kind} of {source} to {to}"


def _check_links(source: Path, run: Path) -> None:
    """Refuse links out of the run: an export would hold the files of whoever makes it."""
    for path in source.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(run.resolve()):
            raise FolderError(f"{path} is a link out of the run; remove it, or put the file there")


def _load_compressed(recipe: Recipe, source: Path) -> Any:
    from velora_torch.training.models import compress_for, load_model

    if recipe.velora is None:
        raise FolderError("this run trained whole weights without VeLoRA: no adapter can hold them")
    there = recipe.model_copy(update={"model": str(source)})
    model = compress_for(recipe, load_model(there, _quiet, _data(recipe)))
    load_state(model, source)
    return model


def _merge(recipe: Recipe, source: Path, to: Path) -> None:
    from peft import PeftModel

    from velora_torch.training.models import load_model, load_tokenizer
    from velora_torch.training.restarts import BASE_FILE, load_base

    plain = recipe.model_copy(update={"method": "full", "lora": None, "quantization": None})
    data = _data(recipe)
    base = load_model(plain, _quiet, data)
    if (source / BASE_FILE).is_file():
        load_base(dict(base.named_parameters()), source)
    model = PeftModel.from_pretrained(base, source).merge_and_unload()
    model.save_pretrained(to)
    if recipe.task == "pretrain":
        prepare_data(recipe, _quiet)[0].save_pretrained(to)
    elif recipe.task != "image-classification":
        load_tokenizer(recipe, _quiet).save_pretrained(to)


def _data(recipe: Recipe) -> PreparedData | None:
    """The data of a run whose model cannot be made without: their classes, their vocabulary."""
    if recipe.task == "language-modeling":
        return None
    return prepare_data(recipe, _quiet)[1]


def _quiet(line: str) -> None:
    """Show nothing."""
