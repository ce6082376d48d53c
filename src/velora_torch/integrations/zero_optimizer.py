"""An optimizer that DeepSpeed's ZeRO-1 or 2 steps, as the one that it was before.

ZeRO steps one flat piece of each group of parameters in each process. To a trainer the optimizer
looks as ever: the groups that it was made with, and a state of whole tensors for each parameter, so
that a checkpoint can be gone on from without ZeRO, and the other way round.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from velora_torch.integrations.deepspeed import own_part, split_by_type

BUCKET = 5_000_000
"""Entries of the buffers through which gradients and weights go, or those of the largest one."""
NO_STEP = -1
"""ZeRO's number of a micro-batch before the first one of a step."""


class ZeroOptimizer(Optimizer):
    """The engine of DeepSpeed that trains a model, and the optimizer that it has taken.

    Args:
        model: what trains; must be where it is to be trained.
        optimizer: elementwise (AdamW, SGD), since ZeRO steps flat pieces; taken over.
        stage: 1 (optimizer states in pieces) or 2 (the gradients too).
        batch_size: examples of a micro-batch.
        clip: the largest norm of the gradient; 0 for any.
    """

    def __init__(  # no Optimizer.__init__, which would install the hooks of one that steps itself
        self, model: nn.Module, optimizer: Optimizer, stage: int, batch_size: int, clip: float
    ) -> None:
        self.param_groups: list[dict[str, Any]] = [dict(group) for group in optimizer.param_groups]
        """As the optimizer was made; what is set in them counts at the next step."""
        self.defaults = optimizer.defaults
        self._origins = split_by_type(optimizer)
        largest = max(p.numel() for group in self.param_groups for p in group["params"])
        bucket = max(BUCKET, largest + largest % 2)  # DeepSpeed wants it even
        config = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": 1,  # the trainer says which micro-batch is the last
            "gradient_clipping": clip,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
            },
            "zero_allow_untested_optimizer": True,
        }
        self._former = {id(p): set(vars(p)) for p in self._parameters()}
        self.engine: Any
        self.engine, *_ = _deepspeed().initialize(model=model, optimizer=optimizer, config=config)
        self.zero: Any = self.engine.optimizer
        self._numbers = {
            id(p): number for number, group in enumerate(self.zero.bit16_groups) for p in group
        }

    # ------------------------------------------------------------------ a step

    def backward(self, loss: Tensor, last: bool) -> None:
        """The backward pass of a micro-batch.

        Args:
            loss: 0-d.
            last: whether it is the step's last one.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def norm(self) -> Tensor:
        """Of the step's gradient, before it is clipped (0-d); every process must ask."""
        norm = torch.as_tensor(self.zero.scaled_global_norm(), dtype=torch.float32)
        return torch.where(norm < 0, torch.inf, norm)  # what ZeRO says of one that is not finite

    def gradients(self) -> Iterator[Tensor]:
        """What this process holds of them."""
        for parts in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            for part in parts.values():
                yield from part or ()
        for group in self.param_groups:
            yield from (p.grad for p in group["params"] if p.grad is not None)

    def forget(self) -> None:
        """Drop all gradients, as ZeRO does when it leaves a step out."""
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        for number in zero.averaged_gradients:
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        zero.micro_step_id = NO_STEP

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the pieces with the settings of `param_groups`, and share what came of it."""
        for group, origin in zip(self.zero.param_groups, self._origins, strict=True):
            settings = self.param_groups[origin]
            group.update({name: value for name, value in settings.items() if name != "params"})
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of what has no part in a step that is under way."""
        self.zero.zero_grad(set_to_none=set_to_none)

    def close(self) -> None:
        """Leave the model as it was found: without hooks and marks."""
        self.engine.destroy()
        for hook in (self.engine.module_forward_pre_hook, self.engine.module_forward_post_hook):
            hook.remove()
        for parameter in self._parameters():
            for mark in vars(parameter).keys() - self._former[id(parameter)]:
                delattr(parameter, mark)

    # ------------------------------------------------------------------ its state

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:  # type: ignore[override]
        """What this process holds: by flat piece, with the piece itself, which is a copy."""
        own = self.zero.optimizer.state
        return {
            piece: {**own.get(piece, {}), "copy": piece}
            for piece in self.zero.single_partition_of_fp32_groups
        }

    def state_dict(self) -> dict[str, Any]:
        """As without ZeRO: whole tensors by parameter, in the first process; all must ask."""
        state: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(self._parameters()):
            piece = self._piece(parameter)
            for name, value in self.zero.optimizer.state.get(piece, {}).items():
                found = value
                if isinstance(value, Tensor):
                    # The number of steps is each parameter's own there, and counted up in place.
                    moment = value.shape == piece.shape
                    found = _gathered(parameter, value) if moment else value.clone()
                if dist.get_rank() == 0:
                    state.setdefault(number, {})[name] = found
        numbers = itertools.count()
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]]}
            for group in self.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state of the whole optimizer; this process keeps its pieces.

        Raises:
            ValueError: it is of another model.
        """
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != sizes:
            raise ValueError(
                f"this optimizer's state is of another model: groups of "
                f"{[len(group['params']) for group in groups]} parameters, and here are {sizes}"
            )
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        if not state_dict["state"]:
            return
        pieces = self.zero.single_partition_of_fp32_groups
        parts: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(self._parameters()):
            position = self._numbers[id(parameter)]
            part = parts.setdefault(position, {})
            for name, value in state_dict["state"].get(number, {}).items():
                moment = isinstance(value, Tensor) and value.shape == parameter.shape
                if name == "step" or not moment:
                    part[name] = value  # the number of steps, which all of a group have made
                    continue
                _scatter(
                    parameter, value, part.setdefault(name, torch.zeros_like(pieces[position]))
                )
        own = self.zero.optimizer
        own.load_state_dict({"state": parts, "param_groups": own.state_dict()["param_groups"]})

    def copies(self, model: nn.Module) -> dict[str, Tensor]:
        """ZeRO's float32 copies of parameters that have fewer bits, whole; all must ask."""
        return {
            name: _gathered(parameter, self._piece(parameter))
            for name, parameter in self._copied(model)
        }

    def load_copies(self, model: nn.Module, copies: Mapping[str, Tensor]) -> None:
        """Take what `copies` gave."""
        for name, parameter in self._copied(model):
            _scatter(parameter, copies[name], self._piece(parameter).data)

    def _copied(self, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        return (
            (name, p)
            for name, p in model.named_parameters()
            if id(p) in self._numbers and p.dtype != torch.float32
        )

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def _piece(self, parameter: Tensor) -> Tensor:
        piece: Tensor = self.zero.single_partition_of_fp32_groups[self._numbers[id(parameter)]]
        return piece


@torch.no_grad()
def _gathered(parameter: Tensor, flat: Tensor) -> Tensor:
    """The whole tensor of which processes have parts, on the CPU of the first; all must ask."""
    whole = flat.new_zeros(parameter.numel())
    if (part := own_part(parameter)) is not None:
        here, there = part
        whole[here] = flat.detach()[there]
    dist.reduce(whole, 0)
    return whole.view(parameter.shape).cpu() if dist.get_rank() == 0 else whole.new_empty(0)


@torch.no_grad()
def _scatter(parameter: Tensor, whole: Tensor, flat: Tensor) -> None:
    """Copy what this process has of a parameter into its place in a flat tensor."""
    if (part := own_part(parameter)) is not None:
        here, there = part
        flat[there] = whole.flatten()[here].to(flat)


def _deepspeed() -> Any:
    """The package, quiet; on machines without an accelerator for their CPUs."""
    alone = not torch.accelerator.is_available()
    if alone:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if alone:  # an operator that it would compile now, and that gloo replaces
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
