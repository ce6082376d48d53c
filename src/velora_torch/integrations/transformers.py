"""Hugging Face's `Trainer`: the state of a compressed model lies in every checkpoint.

    class VeloraTrainer(VeloraTrainerMixin, Trainer): ...

Checkpoints hold plain weights, and next to them what resuming needs (`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from velora_torch.checkpoint import load_state, save_state
from velora_torch.integrations.deepspeed import split_by_type
from velora_torch.layers.adapter import compressed_adapters
from velora_torch.layers.quantized import CompressedQuantized, bases_alone
from velora_torch.layers.scale_shift import ScaleShift
from velora_torch.model import compressed_layers
from velora_torch.pickles import check_pickles, projectors_allowed, projectors_to_devices
from velora_torch.shards import check_shards

OPTIMIZER_NAME = "optimizer.pt"
"""Transformers' file of the optimizer's state."""
ADAPTED = "_hf_peft_config_loaded"
"""What transformers sets on a model that has got adapters."""


class VeloraTrainerMixin:
    """Put before `Trainer` or a class of its kind (such as TRL's `SFTTrainer`)."""

    model: Any
    args: Any
    state: Any
    optimizer: Any
    is_deepspeed_enabled: bool

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        """As the trainer's own; takes a quantised model whose coefficients train."""
        with _taken_for_adapted(model):
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Names of parameters with weight decay: never scales, whose neutral value is 1."""
        names: list[str] = super().get_decay_parameter_names(model)  # type: ignore[misc]
        modules = dict(model.named_modules())
        return [n for n in names if not isinstance(modules[n.rpartition(".")[0]], ScaleShift)]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; for DeepSpeed with a group for each type of parameter.

        It flattens a group into one tensor, and coefficients are float32 beside any weights.
        """
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self.is_deepspeed_enabled:
            split_by_type(optimizer)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save plain weights, and the state of the compressed layers next to them.

        Coefficients that are pending on a quantised base are in that state.
        """
        with bases_alone(), _own_names(self.model, _internal_call):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        self._save_compressed(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_shards(Path(resume_from_checkpoint))
        check_pickles(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self._load_compressed(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        with projectors_allowed(Path(checkpoint) / OPTIMIZER_NAME):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        projectors_to_devices(self.optimizer)
        if self.is_deepspeed_enabled:  # whose engine loaded the rest
            self._load_compressed(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._load_compressed(self.state.best_model_checkpoint)

    def _save_compressed(self, folder: str) -> None:
        if compressed_layers(self.model) or compressed_adapters(self.model):
            save_state(self.model, folder, self.args.should_save)

    def _load_compressed(self, folder: str) -> None:
        layers = compressed_layers(self.model)
        for layer in layers.values():
            # PEFT makes a loaded adapter's parameters trainable; coefficients train this one.
            if layer._parameters["coef"] is not None:
                layer.raw_weight.requires_grad_(False)
        if layers or compressed_adapters(self.model):
            load_state(self.model, folder)


@contextmanager
def _own_names(model: Any, checkpoint: bool) -> Iterator[None]:
    """Let a checkpoint name weights as the model does.

    `save_pretrained` gives some models (ViT) the names of older releases, which `from_pretrained`
    translates; but the trainer loads a checkpoint by name, and would silently train on from fresh
    weights.
    """
    if not (checkpoint and isinstance(model, _pretrained())):
        yield
        return
    save: Any = model.save_pretrained
    model.__dict__["save_pretrained"] = partial(save, save_original_format=False)
    try:
        yield
    finally:
        del model.__dict__["save_pretrained"]


def _pretrained() -> type[nn.Module]:
    from transformers import PreTrainedModel

    return PreTrainedModel


@contextmanager
def _taken_for_adapted(model: Any) -> Iterator[None]:
    """Let `Trainer` take a quantised model that coefficients train.

    It refuses quantised models without adapters, since nothing could train in them, and knows an
    adapted one by this attribute, which would make `save_pretrained` look for adapters later.
    """
    if not isinstance(model, nn.Module) or not any(
        isinstance(layer, CompressedQuantized) for layer in compressed_layers(model).values()
    ):
        yield
        return
    marked: Any = model
    former = marked.__dict__.get(ADAPTED)
    marked.__dict__[ADAPTED] = True
    try:
        yield
    finally:
        if former is None:
            del marked.__dict__[ADAPTED]
        else:
            marked.__dict__[ADAPTED] = former
