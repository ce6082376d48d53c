"""Hugging Face's `Trainer` with DeepSpeed's ZeRO-1 and 2, in the trainer's own order.

accelerate lets DeepSpeed step inside of the backward pass. Here it steps where every optimizer
does, so that a trainer can look at a step before it is made, and leave it out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from velora_torch.integrations.zero_optimizer import ZeroOptimizer

COPIES = "velora_zero_copies.safetensors"
"""In a checkpoint: ZeRO's float32 copies of trained parameters that have fewer bits."""


class ZeroTrainerMixin:
    """Put behind `ShardedTrainerMixin`, before `VeloraTrainerMixin` and a kind of `Trainer`."""

    args: Any
    model: Any
    optimizer: Any
    accelerator: Any
    zero_stage: int | None = None
    """1 or 2; None leaves the trainer as it is."""
    last_part: bool
    _zero: ZeroOptimizer | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the model is as it was found afterwards, but for what it has learnt."""
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        if self._zero is not None:
            self._zero.close()
            self._zero = None
            del self.accelerator.backward, self.accelerator.no_sync
            self.model_wrapped = self.model
        return result

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if self.zero_stage is None or not training or self._zero is not None:
            return super()._wrap_model(model, training, dataloader)  # type: ignore[misc]
        # Autocast lies around the model's own forward: DeepSpeed's engine turns it off outside.
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self._zero = self.optimizer = ZeroOptimizer(
            model,
            self.optimizer,
            self.zero_stage,
            self.args.per_device_train_batch_size,
            self.args.max_grad_norm,
        )
        self.accelerator.backward = self._backward
        # Which micro-batch is the last one, `_backward` says.
        self.accelerator.no_sync = lambda model: contextlib.nullcontext()
        return self._zero.engine

    def _backward(self, loss: Tensor, **settings: Any) -> None:
        assert self._zero is not None
        self._zero.backward(loss, self.accelerator.sync_gradients and self.last_part)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._zero is None:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return self._zero.norm()  # ZeRO clips when it steps

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._zero is None:
            return super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        return self._zero.norm() if grad_norm is None else grad_norm

    def held_gradients(self) -> Iterator[Tensor]:
        """What this process holds of the gradients."""
        if self._zero is not None:
            yield from self._zero.gradients()
        else:
            yield from (p.grad for p in self.model.parameters() if p.grad is not None)

    def forget_gradients(self) -> None:
        """Drop them all, wherever they are."""
        self.model.zero_grad(set_to_none=True)
        if self._zero is not None:
            self._zero.forget()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        copies = {} if self._zero is None else self._zero.copies(self.model)
        if copies and self.args.should_save:
            save_file(copies, Path(output_dir) / COPIES)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self._zero is not None and checkpoint is not None:
            path = Path(checkpoint) / COPIES
            if path.is_file():
                self._zero.load_copies(self.model, load_file(path))
