"""Peak memory and arithmetic of a training step, without running it: on fake tensors.

A deep model is simulated at two small depths and extrapolated: within each segment of a step (the
first, a middle, the last block, what comes before and after them, forward and backward) every
block adds the same bytes, so the peak of a segment is an affine function of depth. That is exact
for models of equal blocks; all others are simulated whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree

from velora_torch.blocks import repeated_blocks
from velora_torch.memory.architecture import Architecture, resolve
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.setup import Setup, dtype_named
from velora_torch.memory.steps import Trace, track
from velora_torch.memory.tracker import ByCategory, Flops, Peak
from velora_torch.overview import summary
from velora_torch.subtoken import folding

ENDS = 2
"""Blocks that speak for themselves alone: the first and the last one."""

Model = str | Path | nn.Module | Any


class SimulationError(ValueError):
    """A model cannot be simulated: an operator has no fake form."""


@dataclass(frozen=True)
class Coarseness:
    """How much of the weight gradient is approximated."""

    weights: int
    """Trained weights whose gradient is coarse."""
    trained: int
    """All trained weights."""
    kept: int
    """Numbers that the coarse gradients have."""

    @property
    def share(self) -> float:
        """Share of the trained weights whose gradient is coarse."""
        return self.weights / self.trained if self.trained else 0.0

    @property
    def factor(self) -> float:
        """How many times smaller a coarse gradient is (1.0 where there is none)."""
        return self.weights / self.kept if self.kept else 1.0

    def __str__(self) -> str:
        """Such as ``96% of the weights, 1/128``."""
        return f"{self.share:.0%} of the weights, 1/{self.factor:.0f}" if self.kept else "exact"


@dataclass(frozen=True)
class Simulation:
    """What a training step holds at its largest moment, and what it computes."""

    model: str
    setup: Setup
    batch: int | None
    seq: int | None
    device: str
    peak_bytes: int
    """The largest moment of the steps."""
    peak: ByCategory
    """That moment by category."""
    peak_at: str
    """The segment of that moment, such as ``backward, layers, last block``."""
    weights: int
    saved: int
    """Saved activations and logits when a forward pass has ended."""
    gradients: int
    optimizer_state: int
    flops: Flops
    """Of one step."""
    coarseness: Coarseness
    segments: dict[str, int] = field(repr=False, default_factory=dict)
    """The largest moment of each segment."""
    simulated_depths: tuple[int, ...] = ()
    """Depths that were simulated; empty: the whole model."""
    estimated: tuple[str, ...] = ()
    """What of it is arithmetic and not simulation."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready numbers."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["setup"] = self.setup.to_dict()
        values["flops"] = {**vars(self.flops), "total": self.flops.total}
        values["coarseness"] = vars(self.coarseness)
        values["peak_gib"] = self.peak_bytes / 2**30
        return values

    def __str__(self) -> str:
        """A short table."""
        size = "" if self.batch is None else f", batch {self.batch}"
        size += "" if self.seq is None else f" x {self.seq} tokens"
        lines = [
            f"{self.model}{size}: {self.setup}",
            f"  peak              {_gib(self.peak_bytes)}  ({self.peak_at})",
        ]
        lines += [f"    {n.replace('_', ' '):18}{_gib(b)}" for n, b in self.peak.items() if b]
        lines.append(f"  saved by forward  {_gib(self.saved)}")
        lines.append(f"  gradients         {_gib(self.gradients)}")
        lines += [f"  estimated: {mark}" for mark in self.estimated]
        return "\n".join(lines)


def simulate(
    model: Model,
    *,
    batch: int | Any = 1,
    seq: int | None = None,
    dtype: str | torch.dtype = "bfloat16",
    device: str = "cuda",
    steps: int = 2,
    extrapolate: bool = True,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    setup: Setup | None = None,
    update: bool = True,
    **choices: Any,
) -> Simulation:
    """Simulate training steps of a model; no weights are loaded and no arithmetic is done.

    Args:
        model: a preset's name, a hub id, a folder with ``config.json``, a configuration, or a
            built model (which is not changed).
        batch: sequences or images of a micro-batch; or, for a built model, a batch itself (a dict
            of keyword arguments, a tuple, or a tensor).
        seq: tokens of a sequence; by default the model's own length, at most 1024.
        dtype: type of a configuration's weights; a built model keeps its own.
        device: ``cuda`` or ``cpu``: which variant of the optimizer's step torch takes.
        steps: optimizer steps; from the second on, optimizer states exist.
        extrapolate: simulate two small depths of a deep model instead of all its blocks.
        loss: of a built model and a batch; by default its output's ``loss``.
        setup: how it is trained; or give the fields of :class:`Setup` as keywords.
        update: ``False`` leaves the optimizer's step out, and so its states.
        **choices: fields of :class:`Setup`.

    Raises:
        ValueError: an unknown model or setting, a batch that does not fit the model's forward, or
            (:class:`SimulationError`) an operator without a fake form.
    """
    if setup is not None and choices:
        raise ValueError(f"give setup, or its fields ({', '.join(choices)}), not both")
    setup = Setup(**choices) if setup is None else setup
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be 'cuda' or 'cpu', got {device!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    architecture = resolve(model)
    case = _Case(architecture, setup, batch, seq, dtype_named(dtype), device, steps, loss, update)
    depths = case.shallow_depths() if extrapolate else None
    if depths is None:
        return case.result(case.trace(None), ())
    shallow, deeper = (case.trace(depth) for depth in depths)
    assert architecture.depth is not None
    periods = (architecture.depth - depths[1]) // (depths[1] - depths[0])
    if shallow.peaks.keys() != deeper.peaks.keys():
        return case.result(case.trace(None), ())
    return case.result(_extend(shallow, deeper, periods), depths)


@dataclass
class _Case:
    architecture: Architecture
    setup: Setup
    batch: Any
    seq: int | None
    dtype: torch.dtype
    device: str
    steps: int
    loss: Callable[[nn.Module, Any], Tensor] | None
    update: bool = True
    coarseness: dict[int | None, Coarseness] = field(default_factory=dict)

    def shallow_depths(self) -> tuple[int, int] | None:
        """Two depths from which the whole follows; ``None`` where all must be simulated."""
        depth = self.architecture.depth
        if depth is None or not self.setup.extrapolates or (self.update and self.steps == 1):
            # In a first step states appear while the optimizer goes on from weight to weight, so
            # it may be at its largest at another weight in a deeper model.
            return None
        # Between the first and the last block every kind of block must occur, and the last
        # block must be of the kind that it is of in the whole model.
        period = self.setup.checkpoint_every or 1
        least = ENDS + period
        first = least + (depth - least) % period
        second = first + period
        return (first, second) if second < depth else None

    def trace(self, depth: int | None) -> Trace:
        """Simulate a model of so many blocks."""
        world = FakeWorld()
        model = self.architecture.build(world, self.dtype, depth)
        if isinstance(self.batch, int):
            batch = self.architecture.batch(world, self.batch, self.seq)
        else:
            batch = world.batch(self.batch)
        compute = self.loss or self.architecture.loss
        tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        try:
            model, optimizer = self.setup.apply(model, world, self.device)
            self.coarseness[depth] = _coarseness(model)
            with world, _chunks_as_on(self.device):
                return track(
                    model,
                    optimizer if self.update else None,
                    lambda: compute(model, batch),
                    tensors,
                    blocks=dict(repeated_blocks(model)),
                    steps=self.steps,
                    accumulation=self.setup.accumulation,
                    vocab=self.architecture.vocab,
                )
        except (
            UnsupportedOperatorException,
            DataDependentOutputException,
            DynamicOutputShapeException,
        ) as error:
            raise SimulationError(
                f"{self.architecture.name} cannot be simulated: the operator {error.func} has no "
                f"form without data. Leave out what needs it, or measure a real step with "
                f"velora_torch.memory.measure_step"
            ) from error

    def result(self, trace: Trace, depths: tuple[int, ...]) -> Simulation:
        """The simulation's outcome."""
        at, top = max(trace.peaks.items(), key=lambda item: item[1].total)
        known = self.coarseness
        coarse = known[None] if None in known else self._extend_coarseness(depths)
        marks = ("4-bit weights: bytes by arithmetic",) if self.setup.method == "qlora" else ()
        return Simulation(
            model=self.architecture.name,
            setup=self.setup,
            batch=self.batch if isinstance(self.batch, int) else None,
            seq=self.seq,
            device=self.device,
            peak_bytes=top.total,
            peak=top.by_category(),
            peak_at=_where(at),
            weights=trace.weights,
            saved=trace.saved,
            gradients=trace.gradients,
            optimizer_state=trace.optimizer_state,
            flops=trace.flops,
            coarseness=coarse,
            segments={name: peak.total for name, peak in trace.peaks.items()},
            simulated_depths=depths,
            estimated=marks,
        )

    def _extend_coarseness(self, depths: tuple[int, ...]) -> Coarseness:
        first, second = (self.coarseness[depth] for depth in depths)
        assert self.architecture.depth is not None
        periods = (self.architecture.depth - depths[1]) // (depths[1] - depths[0])
        return Coarseness(
            *(
                _affine(getattr(first, f.name), getattr(second, f.name), periods)
                for f in fields(Coarseness)
            )
        )


def _affine(shallow: int, deeper: int, periods: int) -> int:
    return deeper + (deeper - shallow) * periods


def _extend(shallow: Trace, deeper: Trace, periods: int) -> Trace:
    """Continue two depths to a third, ``periods`` steps of the same size further."""

    def extend(a: int, b: int) -> int:
        return _affine(a, b, periods)

    peaks = {
        name: Peak(
            extend(peak.total, deeper.peaks[name].total),
            peak.time,
            [extend(a, b) for a, b in zip(peak.parts, deeper.peaks[name].parts, strict=True)],
        )
        for name, peak in shallow.peaks.items()
    }
    numbers = ("weights", "saved", "gradients", "optimizer_state")
    flops = Flops(
        *(
            extend(getattr(shallow.flops, f.name), getattr(deeper.flops, f.name))
            for f in fields(Flops)
        )
    )
    values = {n: extend(getattr(shallow, n), getattr(deeper, n)) for n in numbers}
    return Trace(peaks=peaks, flops=flops, **values)


def _coarseness(model: nn.Module) -> Coarseness:
    layers = summary(model).compressed.values()
    factored = [layer for layer in layers if layer.gradient == "factored"]
    weights = sum(layer.weights for layer in layers)
    kept = sum(layer.outputs * layer.groups for layer in layers)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inside = sum(layer.weights - layer.trainable for layer in factored)
    return Coarseness(weights, numbers + inside, kept)


def _where(segment: str) -> str:
    phase, _, place = segment.partition(":")
    if not place:
        return phase
    blocks, _, part = place.rpartition("/")
    part = {"before": "before its blocks", "after": "after its blocks"}.get(part, f"{part} block")
    return f"{phase}, {blocks}, {part}"


def _gib(number: int) -> str:
    return f"{number / 2**30:8.3f} GiB"


@contextmanager
def _chunks_as_on(device: str) -> Iterator[None]:
    """Fold weights in the pieces that a device uses; fake tensors say they are on the CPU."""
    former = folding.CHUNK["cpu"]
    if device != "cpu":
        folding.CHUNK["cpu"] = folding.CHUNK.get(device, folding.DEFAULT_CHUNK)
    try:
        yield
    finally:
        folding.CHUNK["cpu"] = former
