"""What a finished run writes as its trained model: always something that loads without velora.

Full training, probes and BitFit: a plain checkpoint. PEFT's methods: a PEFT adapter. SSF and
Hydra: merged into a plain checkpoint. Coefficients alone: a PEFT LoRA adapter.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from velora_torch.adapters import merge_adapters
from velora_torch.export import export_lora
from velora_torch.model import restore
from velora_torch.training.schema import Recipe


def save_final(recipe: Recipe, trainer: Any, folder: Path) -> None:
    """Write the trained model, which is not changed."""
    if recipe.method == "coefficients":
        export_lora(trainer.model, folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        return
    if recipe.method in ("ssf", "hydra"):
        merged = merge_adapters(restore(copy.deepcopy(trainer.model)))
        merged.save_pretrained(folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        return
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, for resuming
