"""ReLoRA: every so many steps adapters are merged into the weights, and begin anew.

Lialin, Shivagunde, Muckatira and Rumshisky, "ReLoRA: High-Rank Training Through Low-Rank Updates"
(ICLR 2024, arXiv 2307.05695), Algorithm 1: a sum of low-rank updates has a higher rank than each.

    W <- W + s B A                 what the adapters have learnt becomes part of the weight
    A ~ Kaiming, B <- 0            new adapters, whose output is zero
    moments of A and B <- none     (there: all but the largest hundredth of them)
    rate <- 0                      and in a few steps back on the schedule

The training of all weights that goes before it there is a run of its own here.

Legend: W weight of the base (O x D), A (r x D) and B (O x r) its adapter, s its scale, alpha / r
(rsLoRA: alpha / sqrt(r)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import TrainerCallback

from velora_torch.atomic import write_whole
from velora_torch.model import fold
from velora_torch.subtoken.vectors import layer_seed
from velora_torch.training.schema import Recipe

BASE_FILE = "velora_base.safetensors"
"""In checkpoints: the weights under the adapters, which nobody else has once they have changed."""


@dataclass(frozen=True)
class Restarts:
    """When adapters begin anew, and how the learning rate comes back."""

    every: int
    """Optimizer steps."""
    warmup: int
    """Steps after a restart whose rate is below the schedule's."""
    seed: int
    """Of the new adapters."""

    @classmethod
    def of(cls, recipe: Recipe) -> Restarts | None:
        """What a recipe asks for; None: no restarts."""
        lora = recipe.lora
        if lora is None or lora.restart_every is None:
            return None
        warmup = lora.restart_warmup
        if warmup is None:
            warmup = lora.restart_every // 10
        return cls(lora.restart_every, warmup, recipe.train.seed)

    def share(self, step: int) -> float:
        """Of the schedule's rate, in step number 0, 1, ..."""
        since = step % self.every
        if step < self.every or since >= self.warmup:
            return 1.0
        return (since + 1) / (self.warmup + 1)

    def scheduled(self, rate: Callable[[int], float]) -> Callable[[int], float]:
        """A schedule with the way back after each restart in it."""

        def restarting(step: int) -> float:
            return rate(step) * self.share(step)

        return restarting


class RestartsMixin:
    """Put before `VeloraTrainerMixin`: schedule and checkpoints of a run that restarts."""

    args: Any
    model: Any
    lr_scheduler: Any
    restarts: Restarts | None = None

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, which falls to nothing at each restart."""
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(*args, **kwargs)  # type: ignore[misc]
        if self.restarts is not None and is_new:
            scheduler.lr_lambdas = [self.restarts.scheduled(f) for f in scheduler.lr_lambdas]
        return scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's own; a checkpoint holds the weights under the adapters too."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self.restarts is not None and _internal_call and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_whole(folder / BASE_FILE, save(_on_cpu(base_weights(self.model))))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        _check_alike(checkpoint, self.restarts is not None)
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.restarts is not None:
            load_base(base_weights(self.model), checkpoint)


class RestartAdapters(TrainerCallback):
    """Restarts the adapters of a trainer that has `restarts`."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """After a step, unless it is the last: then they are merged anyway."""
        restarts: Restarts = self._trainer.restarts
        number, left = divmod(state.global_step, restarts.every)
        if left == 0 and state.global_step < state.max_steps:
            restart(self._trainer.model, self._trainer.optimizer, restarts.seed, number)


@torch.no_grad()
def restart(model: nn.Module, optimizer: Any, seed: int, number: int) -> None:
    """Merge a model's LoRA adapters into the weights under them and begin new ones.

    The model computes what it did before, but for rounding to the weights' type.

    Args:
        model: PEFT's around a model whose weights are floating-point numbers; its adapters may be
            compressed.
        optimizer: trains them (accelerate's may be around it); forgets what it knows of them.
        seed: of the new adapters.
        number: of this restart, from one on; each draws others.
    """
    fold(model)
    states = getattr(optimizer, "optimizer", optimizer).state
    for name, layer in _adapted(model):
        weight = layer.get_base_layer().weight
        for adapter in layer.active_adapters:
            delta = layer.get_delta_weight(adapter)
            wide = torch.promote_types(weight.dtype, delta.dtype)
            weight.copy_(weight.to(wide) + delta.to(wide))
            with torch.random.fork_rng():
                torch.manual_seed(layer_seed(name, seed, number))
                layer.reset_lora_parameters(adapter, True)
            for parameter in _parameters(layer, adapter):
                states.pop(parameter, None)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that restarts change, by their names in the model without adapters."""
    return {f"{name}.weight": layer.get_base_layer().weight for name, layer in _adapted(model)}


@torch.no_grad()
def load_base(weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Fill weights, named as in a model without adapters, with those of a checkpoint.

    Raises:
        ValueError: the checkpoint has others.
    """
    saved = load_file(checkpoint / BASE_FILE)
    for name, tensor in saved.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(
                f"{checkpoint / BASE_FILE} has a weight {name!r} of shape {tuple(tensor.shape)}, "
                f"which this model has not: it is of another run"
            )
        weights[name].copy_(tensor)


def _check_alike(checkpoint: Path, restarts: bool) -> None:
    """See that a run which restarts its adapters goes on from one that did, and only from one.

    Raises:
        ValueError: says what to set.
    """
    did = (checkpoint / BASE_FILE).is_file()
    if did != restarts:
        raise ValueError(
            f"{checkpoint} is of a run {'with' if did else 'without'} lora.restart_every, and this "
            f"recipe has {'one' if restarts else 'none'}: set it as it was, or begin another run "
            f"with train.output=..."
        )


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with LoRA adapters, by their names in the model without adapters."""
    from peft.tuners.lora import LoraLayer

    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    for name, module in inner.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _parameters(layer: Any, adapter: str) -> Iterator[nn.Parameter]:
    """What an adapter of a layer trains: parameters of its own, or of modules in it."""
    for part in layer.adapter_layer_names:
        held = getattr(layer, part)
        if adapter in held:
            own = held[adapter]
            yield from [own] if isinstance(own, nn.Parameter) else own.parameters()


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
