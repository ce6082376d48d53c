"""Hugging Face's `Trainer`: the state of a compressed model lies in every checkpoint.

    class VeloraTrainer(VeloraTrainerMixin, Trainer): ...

Checkpoints hold plain weights, and next to them what resuming needs (`checkpoint.py`).
"""

from __future__ import annotations

from typing import Any

from velora_torch.checkpoint import load_state, save_state
from velora_torch.model import compressed_layers


class VeloraTrainerMixin:
    """Put before `Trainer` or a class of its kind (such as TRL's `SFTTrainer`)."""

    model: Any
    args: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save plain weights, and the state of the compressed layers next to them."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self.args.should_save and compressed_layers(self.model):
            save_state(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        layers = compressed_layers(self.model)
        for layer in layers.values():
            # PEFT makes a loaded adapter's parameters trainable; coefficients train this one.
            if layer._parameters["coef"] is not None:
                layer.raw_weight.requires_grad_(False)
        if layers:
            load_state(self.model, resume_from_checkpoint)
