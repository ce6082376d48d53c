"""Checkpoints of sharded training, from which any number of processes can go on, sharding or not.

`Trainer` writes a format of its own where FSDP shards the model, which only FSDP reads. With this
checkpoints are those of any other training, one file with whole tensors; or, where asked for, in
shards (`sharded_checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from velora_torch.integrations.sharded_checkpoint import (
    ShardedState,
    has_shards,
    load_model,
    save_shards,
)
from velora_torch.integrations.tensor_parallel import split_of, whole_state
from velora_torch.layers.conv1d import CompressedConv1D
from velora_torch.layers.linear import CompressedLinear
from velora_torch.model import compressed_layers
from velora_torch.pickles import check_pickles
from velora_torch.sharding import as_sharded, whole_in_first


def widen_biases(model: nn.Module) -> dict[str, torch.dtype]:
    """Let trained biases of 16 bits beside float32 coefficients be float32 too, in place.

    FSDP2 wants one type for all that trains in a group. A layer computes with them as it did with
    those of the weight's type. Call it before the optimizer is built.

    Returns:
        The parameters' names, and what they were.
    """
    found: dict[str, torch.dtype] = {}
    for name, layer in compressed_layers(model).items():
        coef, bias = layer._parameters["coef"], layer._parameters.get("bias")
        plain = isinstance(layer, (CompressedLinear, CompressedConv1D))
        if not plain or coef is None or bias is None or not bias.requires_grad:
            continue
        if bias.dtype != coef.dtype:
            found[f"{name}.bias"] = bias.dtype
            layer._parameters["bias"] = nn.Parameter(bias.detach().to(coef.dtype))
    return found


class ShardedTrainerMixin:
    """Put before `VeloraTrainerMixin`, and that before `Trainer` or a class of its kind."""

    is_fsdp_enabled: bool
    model: Any
    optimizer: Any
    args: Any
    processing_class: Any
    widened: Mapping[str, torch.dtype] = MappingProxyType({})
    """What `widen_biases` has given."""
    shard_checkpoints = False
    """Whether each process writes its shard, where the model is sharded, instead of one all."""
    _has_loaded = False
    _is_final = False

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; a checkpoint's weights are loaded before they are sharded."""
        self._has_loaded = False
        if isinstance(resume_from_checkpoint, str) and self._shards_later():
            with self._as_if_not_sharded():
                self._load_from_checkpoint(resume_from_checkpoint)
            self._has_loaded = True
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._has_loaded:
            return
        if not has_shards(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        check_pickles(Path(resume_from_checkpoint))
        load_model(resume_from_checkpoint, self.model)
        self._load_compressed(resume_from_checkpoint)  # type: ignore[attr-defined]

    def _shards_later(self) -> bool:
        return self.is_fsdp_enabled or getattr(self, "tensor_parallel", 1) > 1

    def _is_sharded(self) -> bool:
        zero = getattr(self, "_zero", None)  # whose optimizer gives and takes whole tensors
        return self.is_fsdp_enabled or split_of(self.model) is not None or zero is not None

    def _writes_shards(self) -> bool:
        return (
            self.shard_checkpoints
            and self.is_fsdp_enabled
            and not hasattr(self.model, "peft_config")
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trainer's own, which gathers whole weights; or a checkpoint's shards."""
        if not (_internal_call and output_dir and self._writes_shards()):
            self._is_final = not _internal_call
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            parts: list[Any] = [getattr(self.model, "config", None), self.processing_class]
            for part in parts:
                if part is not None:
                    part.save_pretrained(output_dir)
        save_shards(output_dir, self.model, self.optimizer, self.args.should_save)
        self._save_compressed(output_dir)  # type: ignore[attr-defined]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None and split_of(self.model) is not None:
            state_dict = whole_state(self.model)
        if self._is_final and state_dict is not None:
            narrow = {
                n: state_dict[n].to(kind) for n, kind in self.widened.items() if n in state_dict
            }
            state_dict = {**state_dict, **narrow}
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded():
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        if self._writes_shards():
            with self._as_if_not_sharded(ShardedState(self.optimizer, output_dir)):
                super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        state = pytree.tree_map_only(Tensor, whole_in_first, self.optimizer.state_dict())
        with self._as_if_not_sharded(_Whole(self.optimizer, state)):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any = self.optimizer
        if checkpoint is not None and has_shards(checkpoint):
            optimizer = ShardedState(self.optimizer, checkpoint)
        elif self._is_sharded():
            optimizer = _Whole(self.optimizer, {})
        with self._as_if_not_sharded(optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    @contextmanager
    def _as_if_not_sharded(self, optimizer: Any = None) -> Iterator[None]:
        former = self.is_fsdp_enabled, self.optimizer
        self.is_fsdp_enabled = False
        if optimizer is not None:
            self.optimizer = optimizer
        try:
            yield
        finally:
            self.is_fsdp_enabled, self.optimizer = former


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
