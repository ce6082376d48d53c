"""The fastest ways to train a model that fit into a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.config import check_choice
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.planner import table as plan_table
from velora_torch.memory.planner.budget import gib, parse_budget
from velora_torch.memory.planner.candidates import Candidate, source_of
from velora_torch.memory.planner.largest import TOKENS, Axis, ranked, verified
from velora_torch.memory.planner.predictor import SAMPLE, Predictor, Size
from velora_torch.memory.planner.ranks import NOT_SHARDED, Layout, Ranks
from velora_torch.memory.planner.search import Search
from velora_torch.memory.planner.space import (
    DEFAULT_OPTIMIZERS,
    SAVINGS,
    Holdings,
    make_space,
)
from velora_torch.memory.simulator.architecture import Architecture, resolve
from velora_torch.memory.simulator.setup import Setup, dtype_named
from velora_torch.memory.simulator.simulate import Model, Simulation
from velora_torch.recomputation import checkpointable

TOP = 5


@dataclass(frozen=True)
class Plan:
    """What fits. ``print`` it for a table."""

    model: str
    method: str
    batch: int | None
    seq: int | None
    budget_bytes: int
    weights_bytes: int
    """The model's weights, which every setup holds."""
    candidates: list[Candidate]
    """Those that fit, the fastest first (or the largest, where sizes were searched)."""
    smallest: Candidate | None
    """Where nothing fits: the setup that needs least."""
    skipped: dict[str, str]
    """Setups that could not be simulated, and why."""
    searched: str | None = None
    """``batch`` or ``seq``, where the largest was searched."""
    simulations: int = 0
    """How many simulations it took."""
    ranks: Ranks = field(default_factory=Ranks)
    """Processes that train together. All bytes are those of one of them, and the batch is its."""

    @property
    def missing_bytes(self) -> int:
        """How much more the smallest setup needs; 0 if something fits."""
        return 0 if self.smallest is None else self.smallest.peak_bytes - self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "method": self.method,
            "gpus": self.ranks.count,
            "strategy": self.ranks.strategy,
            "batch": self.batch,
            "seq": self.seq,
            "budget_bytes": self.budget_bytes,
            "weights_bytes": self.weights_bytes,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "smallest": None if self.smallest is None else self.smallest.to_dict(),
            "missing_bytes": self.missing_bytes,
            "skipped": self.skipped,
        }

    def __str__(self) -> str:
        """A table of the candidates, or what is missing."""
        return plan_table.text(self)


def plan(
    model: Model,
    *,
    method: str = "full",
    batch: int | Any = 1,
    seq: int | None = None,
    budget: str | int,
    dtype: str | torch.dtype = "bfloat16",
    device: str = "cuda",
    optimizers: Sequence[str] | None = None,
    max_batch: bool = False,
    max_seq: bool = False,
    top: int | None = TOP,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    gpus: int = 1,
    strategy: str = "ddp",
    progress: Callable[[int], None] | None = None,
    **fixed: Any,
) -> Plan:
    """Find the ways to train a model that fit into a budget, by simulation: nothing is trained.

    Tries plain training, gradient checkpointing, VeLoRA on sets of layers and sizes of groups,
    recomputed norms and activations, the loss in chunks, optimizers, and their combinations. Of
    those that differ in savings alone that cost (nearly) no arithmetic, it gives the least saving.

    Args:
        model: a preset's name, a hub id, a folder with ``config.json``, a configuration, or a
            built model, as for ``simulate``.
        method: ``full``, ``lora`` or ``qlora``.
        batch: sequences or images of a micro-batch (of each rank, where there are several); for
            a built model also a batch itself.
        seq: tokens of a sequence; by default the model's own length, at most 1024.
        budget: such as ``"24GiB"``, ``"24 GB"``, or a number of bytes; of each GPU.
        dtype: type of a configuration's weights.
        device: ``cuda`` or ``cpu``.
        optimizers: names of simulated optimizers, the preferred one first; by default fused
            AdamW and 8-bit AdamW.
        max_batch: search the largest batch instead of taking ``batch``.
        max_seq: search the longest sequence (a multiple of 8) instead of taking ``seq``.
        top: how many candidates at most; ``None`` for all.
        loss: of a built model and a batch, as for ``simulate``.
        gpus: ranks that train together, one on each GPU; what one of them holds is predicted.
        strategy: ``ddp``, a whole model in each; or ``fsdp2``, a shard of it.
        progress: told the number of each simulated step, from 1, when its simulation begins; how
            many there will be is not known before.
        **fixed: fields of ``Setup`` that are given: ``velora``, ``checkpoint_every``,
            ``recompute``, ``chunked_loss`` and ``optimizer`` are not searched then.

    Raises:
        ValueError: the budget cannot be read or is below the weights alone, or the model or a
            setting is wrong.
    """
    ranks = Ranks(gpus, strategy)
    limit = parse_budget(budget)
    _check(batch, max_batch, max_seq, device, top, fixed)
    base = Setup(method=method, **{k: v for k, v in fixed.items() if k not in SAVINGS})  # type: ignore[arg-type]
    ranks.check(method, [*(optimizers or ()), fixed.get("optimizer", "")])
    architecture = resolve(model)
    size = _size(architecture, batch, seq, max_batch, max_seq)
    whole = _prepared(architecture, base, dtype, None)
    holdings = Holdings.of(whole)
    weights = holdings.weights
    if ranks.shards:
        layout = Layout.of(whole)
        weights += layout.weights(gpus) - layout.weights()
    if weights > limit:
        instead = {"qlora": "a smaller model"}.get(method, "a smaller model or method qlora")
        if ranks.shards:
            instead = "a smaller model or more GPUs"
        raise ValueError(
            f"the budget of {gib(limit)} is below the weights alone: {architecture.name} "
            f"({method}) holds {gib(weights)} of weights{' on each rank' * ranks.shards}. "
            f"Give a larger budget, or choose {instead}"
        )
    sample = whole
    if architecture.depth is not None and architecture.depth > SAMPLE:
        sample = _prepared(architecture, base, dtype, SAMPLE)
    blocks = max((len(blocks) for _, blocks in checkpointable(whole)), default=0)
    if optimizers is None and ranks.shards:
        optimizers = [name for name in DEFAULT_OPTIMIZERS if name not in NOT_SHARDED]
    space = make_space(sample, blocks, base, optimizers, fixed)
    predictor = Predictor(architecture, dtype, device, loss, ranks, progress)
    search = Search(space, predictor, whole, holdings, size, limit)
    name = str(dtype_named(dtype)).removeprefix("torch.")
    make = _Maker(search, name, source_of(model), ranks)
    make.plain(size)
    if max_batch or max_seq:
        found = _largest(search, make, _axis(architecture, size, max_batch), top)
    else:
        found = [make.candidate(simulation) for simulation in search.fitting(top)]
    found.sort(key=lambda candidate: candidate.rank(space.optimizers))
    smallest = None if found else search.smallest()
    return Plan(
        model=architecture.name,
        method=method,
        batch=size.batch if isinstance(size.batch, int) and not max_batch else None,
        seq=None if max_seq else size.seq,
        budget_bytes=limit,
        weights_bytes=weights,
        candidates=found,
        smallest=None if smallest is None else make.candidate(smallest),
        skipped=search.skipped,
        searched="batch" if max_batch else "seq" if max_seq else None,
        simulations=predictor.simulations,
        ranks=ranks,
    )


@dataclass
class _Maker:
    """Makes candidates: compares a step with the plain one."""

    search: Search
    dtype: str
    source: str | None
    ranks: Ranks

    def plain(self, size: Size) -> int:
        """FLOPs of the method's plain step; what cannot be simulated at all fails here."""
        return self.search.predictor.passes(self.search.space.base.plain(), size).flops.total

    def candidate(self, simulation: Simulation, largest: int | None = None) -> Candidate:
        """With its cost at its own size."""
        size = self.search.size
        if largest is not None:
            size = Size(simulation.batch, simulation.seq)
        return Candidate(
            simulation=simulation,
            step_cost=simulation.flops.total / (self.plain(size) or 1),
            fits=simulation.peak_bytes <= self.search.budget,
            dtype=self.dtype,
            largest=largest,
            source=self.source,
            ranks=self.ranks,
        )


def _largest(search: Search, make: _Maker, axis: Axis, top: int | None) -> list[Candidate]:
    """Candidates with the largest sizes; what fits less than those found is not looked at."""
    found = []
    for guess, setup in ranked(search, axis):
        count, simulation = verified(search.predict, setup, axis, guess, search.budget)
        found.append(make.candidate(simulation, count))
        if top is not None and len(found) == top:
            break
    return found


def _axis(architecture: Architecture, size: Size, max_batch: bool) -> Axis:
    if max_batch:
        return Axis.batch(size.seq)
    return Axis.seq(size.batch, architecture.positions)


def _size(
    architecture: Architecture, batch: Any, seq: int | None, max_batch: bool, max_seq: bool
) -> Size:
    """The micro-batch asked for; the smallest one where the largest is searched."""
    if not isinstance(batch, int):
        return Size(batch, None)
    shortest = min(TOKENS, architecture.positions or TOKENS)
    tokens = architecture.seq(shortest if max_seq else seq)
    if max_seq and tokens is None:
        raise ValueError(f"{architecture.name} reads no sequences, so max_seq has no meaning")
    return Size(1 if max_batch else batch, tokens)


def _prepared(
    architecture: Architecture, base: Setup, dtype: str | torch.dtype, depth: int | None
) -> nn.Module:
    """A fake model as the method needs it, without any saving."""
    world = FakeWorld()
    model = architecture.build(world, dtype_named(dtype), depth)
    return replace(base, optimizer="sgd").apply(model, world)[0]


def _check(
    batch: Any, max_batch: bool, max_seq: bool, device: str, top: int | None, fixed: dict[str, Any]
) -> None:
    for name in fixed:
        check_choice("setting", name, tuple(f.name for f in fields(Setup)))
    check_choice("device", device, ("cuda", "cpu"))
    if max_batch and max_seq:
        raise ValueError("max_batch and max_seq exclude each other: give the batch, or the length")
    if (max_batch or max_seq) and not isinstance(batch, int):
        raise ValueError("max_batch and max_seq need a number of examples, not a batch of your own")
    if isinstance(batch, int) and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if top is not None and top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
