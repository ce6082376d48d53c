"""Checkpoints of sharded training that are those of any other: one file, whole tensors.

`Trainer` writes a format of its own where FSDP shards the model, which only FSDP reads. With this,
any number of processes, sharding or not, can go on from any checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from velora_torch.sharding import as_sharded, whole


class WholeTensors:
    """Put before `Trainer` or a class of its kind."""

    is_fsdp_enabled: bool
    optimizer: Any
    _has_loaded = False

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; a checkpoint's weights are loaded before they are sharded."""
        self._has_loaded = False
        if isinstance(resume_from_checkpoint, str) and self.is_fsdp_enabled:
            with self._as_if_not_sharded():
                self._load_from_checkpoint(resume_from_checkpoint)
            self._has_loaded = True
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._has_loaded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        state = pytree.tree_map_only(Tensor, whole, self.optimizer.state_dict())
        with self._as_if_not_sharded(_Whole(self.optimizer, state)):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        with self._as_if_not_sharded(_Whole(self.optimizer, {})):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    @contextmanager
    def _as_if_not_sharded(self, optimizer: Any = None) -> Iterator[None]:
        former = self.optimizer
        self.is_fsdp_enabled = False
        self.optimizer = former if optimizer is None else optimizer
        try:
            yield
        finally:
            self.is_fsdp_enabled, self.optimizer = True, former


class _Whole:
    """A sharded optimizer whose state is whole to the outside."""

    def __init__(self, optimizer: Any, state: dict[str, Any]) -> None:
        self._optimizer, self._state = optimizer, state

    def state_dict(self) -> dict[str, Any]:
        """The state that was gathered."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the optimizer its shards of a state."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        shards = {
            number: {
                key: as_sharded(value, parameters[number])
                if isinstance(value, Tensor) and value.shape == parameters[number].shape
                else value
                for key, value in entries.items()
            }
            for number, entries in state["state"].items()
        }
        self._optimizer.load_state_dict({**state, "state": shards})
