"""Hugging Face's `Trainer` with layers split over processes that take the same examples.

The model is split when it begins to train. Where all processes split each layer, it is whole again
afterwards; where groups of them do, over which FSDP2 shards it, it stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

from velora_torch.integrations.tensor_parallel import SplitModel, split_of

SIZE = "_tp_size"
"""What `Trainer` reads of a model to know how many processes take the same examples."""


class TensorParallelTrainerMixin:
    """Put before `VeloraTrainerMixin`, and that before `Trainer` or a class of its kind."""

    args: Any
    model: Any
    accelerator: Any
    gather_function: Any
    last_part: bool
    tensor_parallel: int = 1
    """Processes that split each layer."""
    shards: Collection[str] = ()
    """Classes of what FSDP2 shards by itself, where there are more processes."""

    @property
    def _split(self) -> SplitModel | None:
        return split_of(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the model's layers are split meanwhile."""
        if self.tensor_parallel == 1:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        split = SplitModel(self.model, self.tensor_parallel, self.shards)
        former = getattr(self.model, SIZE, None)
        setattr(self.model, SIZE, self.tensor_parallel)
        try:
            result = super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            setattr(self.model, SIZE, former)
        split.join()
        return result

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        split = self._split
        if split is not None and training:
            # Prepared like this, nothing wraps it that would average gradients.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            if split.groups > 1:
                self.accelerator.no_sync = _without_reducing
        return super()._wrap_model(model, training, dataloader)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: Any) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        split = self._split
        if split is not None:  # a checkpoint of processes that took other examples each
            split.share_random()

    def training_step(self, *args: Any) -> Tensor:
        """One forward and backward pass."""
        loss: Tensor = super().training_step(*args)  # type: ignore[misc]
        split = self._split
        if split is not None and self.accelerator.sync_gradients and self.last_part:
            split.sum_gradients()
        return loss

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]
        split = self._split
        if split is not None and hasattr(loader.batch_sampler, "num_processes"):
            loader.batch_sampler.num_processes = split.groups
            loader.batch_sampler.process_index = split.group
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, which counts the examples of each group once."""
        former = self.gather_function
        if self._split is not None:
            self.gather_function = self._gather_groups
        try:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.gather_function = former

    def _gather_groups(self, values: Tensor, *rest: Any, **options: Any) -> Tensor:
        """What groups have of a batch, (B, ...) each; without what only fills up the last one."""
        split, state = self._split, self.accelerator.gradient_state
        assert split is not None
        found: Tensor = self.accelerator.gather(values)
        found = found.view(split.groups, split.ranks, *values.shape)[:, 0].flatten(0, 1)
        last = state.end_of_dataloader and state.remainder > 0
        return found[: state.remainder] if last else found

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, with the groups of a model that is not split.

        `Trainer` gives split tensors a group of their own, since one kernel can't take both kinds.
        """
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self._split is None:
            return optimizer
        decayed = set(self.get_decay_parameter_names(self.model))  # type: ignore[attr-defined]
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        common = {**optimizer.param_groups[0], "foreach": False}
        optimizer.param_groups = [
            {
                **common,
                "weight_decay": self.args.weight_decay if decays else 0.0,
                "params": [p for name, p in trained if (name in decayed) == decays],
            }
            for decays in (True, False)
        ]
        return optimizer


@contextlib.contextmanager
def _without_reducing(model: Any) -> Iterator[None]:
    """Let FSDP2 keep the gradients of a micro-batch that is not the last one."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
