"""Peak memory and arithmetic of a training step, without running it: on fake tensors.

A deep model is simulated at two small depths and extrapolated: within each segment of a step (the
first, a middle, the last block, what comes before and after them, forward and backward) every
block adds the same bytes, so the peak of a segment is an affine function of depth. That is exact
for models of equal blocks; all others are simulated whole.
"""

from __future__ import annotations

import inspect
import threading
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
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.simulator.architecture import Architecture, resolve
from velora_torch.memory.simulator.setup import Setup, dtype_named
from velora_torch.memory.simulator.simulation import Coarseness, Simulation, where
from velora_torch.memory.simulator.steps import Trace, track
from velora_torch.memory.simulator.tracker import Flops, Peak
from velora_torch.overview import summary
from velora_torch.subtoken import factored, folding

ENDS = 2
"""Blocks that speak for themselves alone: the first and the last one."""

_ONE_AT_A_TIME = threading.RLock()
"""Meanwhile pieces are those of another device (`_chunks_as_on`) and transformers looks at no
numbers (`Rows.known`); two threads would undo that in the wrong order."""

Model = str | Path | nn.Module | Any


NO_FORM = (
    UnsupportedOperatorException,
    DataDependentOutputException,
    DynamicOutputShapeException,
)
"""What fake tensors raise for operators that need data."""


class SimulationError(ValueError):
    """A model cannot be simulated: an operator has no fake form, or the batch does not fit."""


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

    Simulations in several threads take turns.

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
    if seq is not None and not isinstance(batch, int):
        raise ValueError(f"seq={seq} is for a number of examples; the batch given has its own")
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
        with _ONE_AT_A_TIME:
            return self._trace(depth)

    def _trace(self, depth: int | None) -> Trace:
        world = FakeWorld()
        model = self.architecture.build(world, self.dtype, depth)
        if isinstance(self.batch, int):
            batch = self.architecture.batch(world, self.batch, self.seq)
        else:
            batch = world.batch(self.batch)
        tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        if not tensors:
            raise ValueError(
                f"batch must be a number of examples, or a batch of tensors, got {self.batch!r}"
            )
        takes = ", ".join(inspect.signature(model.forward).parameters)
        try:
            model, optimizer = self.setup.apply(model, world, self.device)
            self.coarseness[depth] = _coarseness(model)
            with world, _chunks_as_on(self.device):
                return track(
                    model,
                    optimizer if self.update else None,
                    lambda: self.loss_of(model, batch, takes),
                    tensors,
                    blocks=dict(repeated_blocks(model)),
                    steps=self.steps,
                    accumulation=self.setup.accumulation,
                    vocab=self.architecture.vocab,
                )
        except NO_FORM as error:
            raise SimulationError(
                f"{self.architecture.name} cannot be simulated: the operator {error.func} has no "
                f"form without data. Leave out what needs it, or measure a real step with "
                f"velora_torch.memory.measure_step"
            ) from error

    def loss_of(self, model: nn.Module, batch: Any, takes: str) -> Tensor:
        """The loss, or what is wrong with the batch."""
        try:
            value = (self.loss or self.architecture.loss)(model, batch)
        except NO_FORM:
            raise
        except (TypeError, RuntimeError, IndexError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise SimulationError(
                f"{self.architecture.name} does not run on this batch: {reason}. Its forward takes "
                f"({takes}), the batch holds {_describe(batch)}. If a real batch of these shapes "
                f"runs, an operator of the model has no form without data: then measure a real "
                f"step with velora_torch.memory.measure_step"
            ) from error
        if not (isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad):
            raise ValueError(
                f"the loss of {self.architecture.name} must be a 0-d tensor that depends on what "
                f"is trained, got {_describe(value)}"
            )
        return value

    def result(self, trace: Trace, depths: tuple[int, ...]) -> Simulation:
        """The simulation's outcome."""
        at, top = max(trace.peaks.items(), key=lambda item: item[1].total)
        known = self.coarseness
        coarse = known[None] if None in known else self._extend_coarseness(depths)
        counts = isinstance(self.batch, int)
        return Simulation(
            model=self.architecture.name,
            setup=self.setup,
            batch=self.batch if counts else None,
            seq=self.architecture.seq(self.seq) if counts else None,
            device=self.device,
            peak_bytes=top.total,
            peak=top.by_category(),
            peak_at=where(at),
            weights=trace.weights,
            saved=trace.saved,
            gradients=trace.gradients,
            optimizer_state=trace.optimizer_state,
            flops=trace.flops,
            coarseness=coarse,
            segments=trace.segments(),
            moments=trace.moments(),
            simulated_depths=depths,
            estimated=_estimated(self.setup),
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


def _estimated(setup: Setup) -> tuple[str, ...]:
    marks = []
    if setup.method == "qlora":
        marks.append("4-bit weights: bytes by arithmetic")
    if setup.optimizer == "adamw_8bit":
        marks.append("8-bit optimizer states: bytes by arithmetic")
    return tuple(marks)


def _describe(batch: Any) -> str:
    """Names and shapes of a batch's tensors."""
    found = pytree.tree_flatten_with_path(batch)[0]
    parts = [
        f"{pytree.keystr(path)} {tuple(x.shape)} {x.dtype}".strip()
        for path, x in found
        if isinstance(x, Tensor)
    ]
    return ", ".join(parts) or f"no tensor but {type(batch).__name__}"


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


@contextmanager
def _chunks_as_on(device: str) -> Iterator[None]:
    """Fold and project in the pieces that a device uses; fake tensors say they are on the CPU."""
    if device == "cpu":
        yield
        return
    folded, projected = folding.CHUNK["cpu"], factored.CHUNK.pop("cpu")
    folding.CHUNK["cpu"] = folding.CHUNK.get(device, folding.DEFAULT_CHUNK)
    try:
        yield
    finally:
        folding.CHUNK["cpu"], factored.CHUNK["cpu"] = folded, projected
