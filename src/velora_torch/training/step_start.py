"""What a forward pass changes, kept at the start of a step so that the step can be taken again."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.layers import CompressedLayer
from velora_torch.layers.adapter import CompressedAdapter
from velora_torch.layers.state import TENSORS

VECTORS = tuple(f"velora_{key}" for key in TENSORS)
"""Buffers of compressed layers."""


class StepStart:
    """Random numbers, buffers and the vectors of compressed layers before a step.

    Weights and optimizer states are not in it: forward and backward passes leave them. Vectors are
    replaced and never changed in place, so that it holds them without a copy.

    Args:
        model: what trains.
        forget_gradients: drops them all.
    """

    def __init__(self, model: nn.Module, forget_gradients: Callable[[], None]) -> None:
        self._random = _random_states()
        self._forget_gradients = forget_gradients
        self._layers: list[tuple[CompressedLayer, dict[str, Any], dict[str, Any]]] = []
        self._adapters: list[tuple[CompressedAdapter, dict[str, Any]]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        for module in model.modules():
            if isinstance(module, CompressedLayer):
                vectors = {name: module._buffers[name] for name in VECTORS}
                self._layers.append((module, vars(module.velora).copy(), vectors))
            if isinstance(module, CompressedAdapter):
                sites = {k: copy.copy(site) for k, site in module.velora_adapter.sites.items()}
                self._adapters.append((module, sites))
            for name, buffer in module._buffers.items():
                passing = name in module._non_persistent_buffers_set  # constants, and ours
                if buffer is not None and not passing:
                    self._buffers.append((buffer, buffer.detach().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Be again where the step began, without gradients."""
        self._forget_gradients()
        set_random_states(self._random)
        for buffer, value in self._buffers:
            buffer.copy_(value)
        for layer, counters, vectors in self._layers:
            vars(layer.velora).update(counters)
            layer._buffers.update(vectors)
            if not layer.velora.drawn:
                layer.take_unchecked()
            layer.adopt_coef()  # a gradient that is gone has trained nothing
        for adapter, sites in self._adapters:
            adapter.velora_adapter.sites = {k: copy.copy(site) for k, site in sites.items()}

    def restore_random(self) -> None:
        """Draw the random numbers of the step again."""
        set_random_states(self._random)


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()  # of this process's device
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Let Python's and torch's generators go on from states of theirs."""
    random.setstate(states["python"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
