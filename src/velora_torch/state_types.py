"""Optimizer states in the types that they were saved in."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def keep_types(optimizer: Optimizer) -> None:
    """Have states loaded as they were saved, by hooks; torch gives them the parameters' types.

    That would round states that are kept in float32 for bfloat16 weights, as Adafactor's are.
    """
    loading: list[Mapping[str, Any]] = []

    def before(_optimizer: Optimizer, state: dict[str, Any]) -> None:
        loading[:] = [state]

    def after(optimizer: Optimizer) -> None:
        restore_types(optimizer, loading.pop())

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


def restore_types(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Replace states by the saved ones where an optimizer that has loaded them changed their type.

    Args:
        optimizer: has the parameters of `saved` in the same order.
        saved: what its `load_state_dict` was given.
    """
    numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, parameter in zip(numbers, parameters, strict=True):
        own = optimizer.state[parameter] if number in saved["state"] else {}
        for name, value in own.items():
            before = saved["state"][number].get(name)
            both = isinstance(value, Tensor) and isinstance(before, Tensor)
            if both and value.dtype != before.dtype:
                own[name] = before.to(value.device, copy=True)
