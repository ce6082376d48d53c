"""What is measured on each architecture, once in a process."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from velora_torch import VeloraConfig, compress, summary
from velora_torch.memory.count import saved_bytes
from velora_torch.model import compressed_layers

from .architecture import Architecture, Batch
from .products import product_holders

CONFIG = VeloraConfig(num_groups=4)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Dropout, masks and the like are those of a seed, and nobody else notices."""
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (transformers masks speech with it)
        yield
    random.setstate(python)
    np.random.set_state(of_numpy)  # noqa: NPY002


@functools.cache
def _built(architecture: Architecture) -> nn.Module:
    with seeded(0):
        return architecture.build().eval()


def plain_model(architecture: Architecture) -> nn.Module:
    """A model of its own, always with the same weights."""
    return copy.deepcopy(_built(architecture))


def compressed_model(architecture: Architecture) -> nn.Module:
    return compress(plain_model(architecture), CONFIG)


def run(model: nn.Module, batch: Batch, seed: int = 0) -> list[Tensor]:
    """All floating-point tensors that a model returns."""
    with seeded(seed):
        found = pytree.tree_leaves(model(**batch))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A loss that depends on every output."""
    losses = [(y - 1).float().square().mean() for y in outputs if y.requires_grad]
    return torch.stack(losses).sum()


@dataclass(frozen=True)
class Step:
    """One training step without an optimizer, in training mode."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    """Of parameters and of the model's own inputs, by name."""
    input_gradients: dict[str, Tensor]
    """Of the inputs of layers, by name and call."""
    saved: int
    """Bytes that autograd keeps for the backward pass."""
    uncalled: list[str]
    """Of the layers, those whose forward did not run: others use their weight."""


def training_step(architecture: Architecture, model: nn.Module, layers: list[str]) -> Step:
    """Run a step, and look at the gradients of these layers' inputs."""
    model.train()
    batch = architecture.batch(0)
    if architecture.takes_gradients:
        for value in batch.values():
            value.requires_grad_(value.is_floating_point())
    inputs: dict[str, Tensor] = {}
    hooks, called = [], set()
    for name in layers:

        def watch(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            (x,) = args
            called.add(name)
            if x.requires_grad:
                call = sum(key.startswith(f"{name}#") for key in inputs)
                key = f"{name}#{call}"
                inputs[key] = torch.zeros(())
                x.register_hook(lambda grad: inputs.__setitem__(key, grad.clone()))

        hooks.append(model.get_submodule(name).register_forward_pre_hook(watch))
    with saved_bytes(model) as count:
        outputs = run(model, batch)
    saved = count()
    del count
    loss_of(outputs).backward()
    for hook in hooks:
        hook.remove()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"input {k}": v.grad for k, v in batch.items() if v.grad is not None}
    uncalled = [name for name in layers if name not in called]
    return Step([y.detach() for y in outputs], gradients, inputs, saved, uncalled)


@dataclass(frozen=True)
class Comparison:
    """One architecture, plain and compressed."""

    layers: list[str]
    """The compressed layers."""
    evaluated: tuple[list[Tensor], list[Tensor]]
    """Outputs in evaluation mode: plain, compressed."""
    plain: Step
    compressed: Step
    exact: dict[str, str]
    """Why layers stay exact, by name."""
    multiplying: list[str]
    """Modules whose parameters are factors of matrix products or convolutions."""


@functools.cache
def compare(architecture: Architecture) -> Comparison:
    """Run an architecture with and without compression, on the same batch and the same dropout."""
    plain, compressed = plain_model(architecture), compressed_model(architecture)
    layers = list(compressed_layers(compressed))
    batch = architecture.batch(0)
    with product_holders(plain) as multiplying:
        run(plain, batch)
    with torch.no_grad():
        before, after = run(plain, batch), run(compressed, batch)
    return Comparison(
        layers,
        (before, after),
        training_step(architecture, plain, layers),
        training_step(architecture, compressed, layers),
        summary(compressed).exact,
        multiplying,
    )


STEPS = 3


@functools.cache
def trained_model(architecture: Architecture) -> nn.Module:
    """A compressed model after a few steps; to look at, not to change."""
    model = compressed_model(architecture)
    # Adam without decay, so that a weight moves by its gradient or not at all.
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for seed in range(STEPS):
        train_one_step(model, optimizer, architecture.batch(seed), seed)
    model.eval()
    with torch.no_grad():
        run(model, architecture.batch(STEPS))  # recurrent models keep their last state: no graph
    return model


def train_one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, seed: int
) -> None:
    model.train()
    loss_of(run(model, batch, seed)).backward()
    optimizer.step()
    optimizer.zero_grad()
