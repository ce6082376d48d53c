"""What a finished run writes as its trained model: always something that loads without velora.

Full training, probes and BitFit: a plain checkpoint. PEFT's methods: a PEFT adapter; after
pre-training, whose base nobody has, merged into a plain checkpoint. SSF and Hydra: the same.
Coefficients alone: a PEFT LoRA adapter.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from velora_torch.adapters import merge_adapters
from velora_torch.export import export_lora
from velora_torch.model import restore
from velora_torch.training.nonfinite import check_weights
from velora_torch.training.schema import PEFT_METHODS, Recipe
from velora_torch.training.staging import STAGING, explained, place


def save_final(recipe: Recipe, trainer: Any, folder: Path) -> None:
    """Write the trained model, which is not changed: whole, or not at all.

    Raises:
        SavingError: it can't be written; what was in `folder` stays.
        NonFiniteError: its weights are not finite; nothing is written.
    """
    check_weights(trainer.model, "after the last step")
    output, work = folder.parent, folder.parent / STAGING / folder.name
    with explained(output, "the trained model"):
        _write(recipe, trainer, work)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            place(output, folder.name)


def _write(recipe: Recipe, trainer: Any, folder: Path) -> None:
    if recipe.method == "coefficients":
        export_lora(trainer.model, folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        return
    pretrained_adapters = recipe.task == "pretrain" and recipe.method in PEFT_METHODS
    if recipe.method in ("ssf", "hydra") or pretrained_adapters:
        plain = restore(copy.deepcopy(trainer.model))
        merged = plain.merge_and_unload() if pretrained_adapters else merge_adapters(plain)
        merged.save_pretrained(folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        return
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, for resuming
