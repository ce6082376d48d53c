"""Peaks of many ways to train one model, from few simulations.

A forward and backward pass holds the same whatever the optimizer is, besides its states; and an
optimizer's step holds the same whatever was checkpointed and recomputed before it. So passes and
steps are simulated apart, each once, and put together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.config import RANDOM, VeloraConfig
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.planner.ranks import (
    OPTIMIZER,
    Layout,
    Ranks,
    replicated,
    sharded,
    sharded_step,
)
from velora_torch.memory.simulator.architecture import Architecture
from velora_torch.memory.simulator.setup import Setup, dtype_named
from velora_torch.memory.simulator.simulate import Simulation, simulate

BLOCK = 512
SAMPLE = 3
"""Blocks that show which layers a deep model has."""


@dataclass(frozen=True)
class Size:
    """A micro-batch."""

    batch: Any
    """Number of examples, or a batch itself."""
    seq: int | None


@dataclass
class Predictor:
    """Simulates parts of steps of one model, and remembers them."""

    architecture: Architecture
    dtype: str | torch.dtype
    device: str
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    ranks: Ranks = field(default_factory=Ranks)
    """Processes that train together; what one of them holds is predicted."""
    progress: Callable[[int], None] | None = None
    """Told the number of each simulation, from 1, when it begins."""
    simulations: int = 0
    """How many were made."""
    _passes: dict[str, Simulation] = field(default_factory=dict, repr=False)
    _steps: dict[str, Simulation] = field(default_factory=dict, repr=False)
    _batches: dict[Size, int] = field(default_factory=dict, repr=False)
    _layouts: dict[str, Layout] = field(default_factory=dict, repr=False)
    _turned: dict[str, Simulation] = field(default_factory=dict, repr=False)

    def predict(self, setup: Setup, size: Size) -> Simulation:
        """What :func:`simulate` gives for a setup."""
        passes, step = self.passes(setup, size), self.step(setup, size)
        state = step.optimizer_state
        segments = {name: total + state for name, total in passes.segments.items()}
        segments |= {n: total for n, total in step.segments.items() if n == OPTIMIZER}
        top, at = passes.peak_bytes + state, passes.peak_at
        parts, exchanged = passes.peak | {"optimizer_state": state}, passes.exchanged
        if segments.get(OPTIMIZER, 0) > top:
            top, at = segments[OPTIMIZER], OPTIMIZER
            parts, exchanged = self._parts(step, size), step.exchanged
        return replace(
            passes,
            setup=setup,
            peak_bytes=top,
            peak=parts,
            peak_at=at,
            optimizer_state=state,
            segments=segments,
            exchanged=exchanged,
        )

    def passes(self, setup: Setup, size: Size) -> Simulation:
        """A forward and a backward pass; the setup's optimizer plays no part."""
        velora = _drawn(setup.velora)
        setup = replace(setup, optimizer="sgd", velora=velora)
        # The sum of what was folded, which an adapter is exported from, exists after a step.
        folded = velora is not None and velora.track_delta and velora.gradient == "factored"
        steps = 2 if folded or (velora is not None and velora.init not in RANDOM) else 1
        key = repr((setup, size.batch if isinstance(size.batch, int) else None, size.seq))
        if key not in self._passes:
            self._passes[key] = self._simulate(
                setup, size, update=folded, steps=steps, loss=self.loss
            )
        return self._passes_of_rank(key, setup)

    def step(self, setup: Setup, size: Size) -> Simulation:
        """The optimizer's steps of a setup, after a backward pass that is none.

        Checkpoints and recomputation play no part.
        """
        plain = replace(setup, checkpoint_every=None, recompute=False, chunked_loss=False)
        key = repr(plain)
        if key not in self._steps:
            self._steps[key] = self._simulate(plain, size, steps=2, loss=_sum_of_weights)
        return self._at(self._step_of_rank(key), size)

    def layout(self, setup: Setup) -> Layout:
        """How the whole model is sharded, prepared as a setup says."""
        plain = replace(
            setup, checkpoint_every=None, recompute=False, chunked_loss=False, optimizer="sgd"
        )
        key = repr(plain)
        if key not in self._layouts:
            depth = self.architecture.depth
            sampled = depth is not None and depth > SAMPLE and setup.extrapolates
            world = FakeWorld()
            built = self.architecture.build(
                world, dtype_named(self.dtype), SAMPLE if sampled else None
            )
            model, _ = plain.apply(built, world)
            self._layouts[key] = Layout.of(model, depth if sampled else None)
        return self._layouts[key]

    def _passes_of_rank(self, key: str, setup: Setup) -> Simulation:
        alone = self._passes[key]
        if not self.ranks.several:
            return alone
        key = f"passes {key}"
        if key not in self._turned:
            self._turned[key] = (
                sharded(alone, self.layout(setup), self.ranks.count)
                if self.ranks.shards
                else replicated(alone)
            )
        return self._turned[key]

    def _step_of_rank(self, key: str) -> Simulation:
        alone = self._steps[key]
        if not self.ranks.several:
            return alone
        key = f"step {key}"
        if key not in self._turned:
            size = Size(alone.batch, alone.seq)
            self._turned[key] = (
                sharded_step(
                    alone,
                    self.layout(alone.setup),
                    self.ranks.count,
                    self.device,
                    self._batch_bytes(size),
                )
                if self.ranks.shards
                else replicated(alone)
            )
        return self._turned[key]

    def _at(self, step: Simulation, size: Size) -> Simulation:
        """The same step with another batch, whose bytes are all that it sees of it."""
        if not isinstance(size.batch, int) or (step.batch, step.seq) == (size.batch, size.seq):
            return step
        more = self._batch_bytes(size) - self._batch_bytes(Size(step.batch, step.seq))
        segments = {name: total + more for name, total in step.segments.items()}
        return replace(step, segments=segments)

    def _parts(self, step: Simulation, size: Size) -> dict[str, int]:
        """The largest moment of an optimizer's step by category."""
        known = {
            "weights": step.weights,
            "gradients": step.gradients,
            "optimizer_state": step.optimizer_state,
            "saved_activations": self._batch_bytes(size),
            "logits": 0,
        }
        total = step.segments[OPTIMIZER]
        return {name: known.get(name, total - sum(known.values())) for name in step.peak}

    def _batch_bytes(self, size: Size) -> int:
        if not isinstance(size.batch, int):
            return 0
        if size not in self._batches:
            batch = self.architecture.batch(FakeWorld(), size.batch, size.seq)
            self._batches[size] = sum(-(-t.nbytes // BLOCK) * BLOCK for t in batch.values())
        return self._batches[size]

    def _simulate(self, setup: Setup, size: Size, **choices: Any) -> Simulation:
        self.simulations += 1
        if self.progress is not None:
            self.progress(self.simulations)
        return simulate(
            self.architecture,
            batch=size.batch,
            seq=size.seq,
            dtype=self.dtype,
            device=self.device,
            setup=setup,
            **choices,
        )


def _drawn(velora: VeloraConfig | None) -> VeloraConfig | None:
    """The same with vectors that need no first batch, as they are from the second step on.

    Those that every batch changes stay as they are.
    """
    if velora is None or velora.init not in ("average", "svd"):
        return velora
    return replace(velora, init="random")


def _sum_of_weights(model: nn.Module, batch: Any) -> Tensor:
    """Gives every trained weight a gradient of its size, without a forward pass."""
    return torch.stack([p.sum().float() for p in model.parameters() if p.requires_grad]).sum()
