"""What one rank of several holds: a step of one process, turned by arithmetic.

``ddp`` (torch's DistributedDataParallel): all that one process holds, and buckets into which the
reducer copies gradients: as many bytes as the gradients of what trains, from the first step to the
last. (``gradient_as_bucket_view=True`` would spare them; neither accelerate nor transformers'
``Trainer`` sets it.)

``fsdp2`` (torch's ``fully_shard`` on every repeated block, then on the root, as its documentation
has it), with N ranks:

- A parameter of R rows lies in shards of ceil(R/N) rows; the last ranks' are padded. Its gradient
  and its optimizer states are sharded alike. Predicted is rank 0, which holds most. Buffers
  (vectors of VeLoRA among them) are whole on every rank, activations are those of its own batch.
- *Forward*: the root's own parameters, whole until its backward pass has ended, and a block: whole,
  with the buffer that it was gathered in, which is kept until the next block is here. So two
  blocks. Before the first block it is the root that lies there twice.
- *Backward*: the root, the block that works, and the buffer of the one that comes next (none after
  the first block): two blocks again. The block's own gradients are whole, those of the root, which
  are reduced last, too; and one copy of the former block's gradients, from which they are reduced,
  lives until the next ones come.
- *Optimizer*: shards alone.
- Micro-batches (``accumulation``): gradients are whole until the last one has ended, as
  accelerate's ``no_sync`` leaves them.

accelerate shards embeddings and head apart from the root, and so holds less than this.
Source: torch 2.14, ``torch/distributed/fsdp/_fully_shard`` (``_fsdp_param_group.py``:
``wait_for_unshard``, ``_backward_prefetch``, ``post_backward``; ``_fsdp_collectives.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from velora_torch.blocks import repeated_blocks
from velora_torch.config import check_choice
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.simulator.optimizers import make_optimizer
from velora_torch.memory.simulator.simulation import Simulation, where
from velora_torch.memory.simulator.steps import track
from velora_torch.memory.simulator.tracker import BLOCK, ByCategory

STRATEGIES = ("ddp", "fsdp2")
OPTIMIZER = "optimizer"
NOT_SHARDED = {
    "galore_adamw": "it projects whole gradients",
    "adamw_8bit": "bitsandbytes' states have no rows",
}
"""Optimizers that ``fsdp2`` can't shard, and why."""
"""The segment of the optimizer's step."""


@dataclass(frozen=True)
class Ranks:
    """How many processes train, one on each GPU, and how they share the model.

    Raises:
        ValueError: a number or a strategy that there is not, or ``fsdp2`` for one process.
    """

    count: int = 1
    strategy: str = "ddp"

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"gpus must be a number of at least 1, got {self.count!r}")
        check_choice("strategy", self.strategy, STRATEGIES)
        if self.shards and self.count == 1:
            raise ValueError(
                "strategy fsdp2 shards the model over several GPUs, and gpus is 1: "
                "give a larger number (--gpus 2), or leave the strategy out"
            )

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.count > 1

    @property
    def shards(self) -> bool:
        """Whether each holds a shard of the model."""
        return self.strategy == "fsdp2"

    def check(self, method: str, optimizers: Iterable[str]) -> None:
        """Refuse what ``fsdp2`` can't shard, or what is not known to be.

        Raises:
            ValueError: says what to choose instead.
        """
        if self.shards and method == "qlora":
            raise ValueError(
                "no plan for strategy fsdp2 with method qlora: packed 4-bit weights are not "
                "sharded by rows. Choose method lora, or strategy ddp"
            )
        for name, why in NOT_SHARDED.items():
            if self.shards and name in optimizers:
                raise ValueError(
                    f"no plan for strategy fsdp2 with {name}: {why}. Choose another optimizer, or "
                    "strategy ddp"
                )


def shard_rows(rows: int, ranks: int, rank: int = 0) -> int:
    """Rows that a rank has of so many; padded to those of rank 0."""
    most = -(-rows // ranks)
    return max(0, min(most, rows - rank * most))


def rounded(count: int) -> int:
    """Bytes in the allocator's blocks."""
    return -(-count // BLOCK) * BLOCK


@dataclass(frozen=True)
class Held:
    """A parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    late: bool = False
    """Of the root: used behind the blocks, so that its gradient is among the first."""

    def shard(self, ranks: int, rank: int = 0) -> tuple[int, ...]:
        """The shape of what a rank has."""
        rows = self.shape[0] if self.shape else 1
        return (shard_rows(rows, ranks, rank), *self.shape[1:])

    def nbytes(self, ranks: int = 1) -> int:
        """Bytes of a shard, padding included; with one rank those of the whole."""
        return torch.Size(self.shard(ranks)).numel() * self.dtype.itemsize


Unit = tuple[Held, ...]
"""Parameters that are gathered and reduced together."""


@dataclass(frozen=True)
class Layout:
    """The units in which a model is sharded: its root's own parameters, and its blocks."""

    root: Unit
    blocks: tuple[Unit, ...]

    @staticmethod
    def of(model: nn.Module, depth: int | None = None) -> Layout:
        """Of a prepared model; with the middle block repeated where it is a shallow sample.

        Args:
            model: without savings that add modules.
            depth: blocks that the whole model has; ``None``: as many as this one.
        """
        modules = [block for _, blocks in repeated_blocks(model) for block in blocks]
        inside = {id(p): i for i, block in enumerate(modules) for p in block.parameters()}
        root: dict[int, Held] = {}
        units: list[list[Held]] = [[] for _ in modules]
        seen: set[int] = set()
        late = False
        for _, p in model.named_parameters(remove_duplicate=False):
            late = late or id(p) in inside
            held = Held(tuple(p.shape), p.dtype, p.requires_grad)
            if id(p) not in inside:
                root[id(p)] = replace(held, late=late)
            elif id(p) not in seen:
                units[inside[id(p)]].append(held)
            seen.add(id(p))
        blocks = [tuple(unit) for unit in units]
        if depth is not None and depth > len(blocks):
            middle = len(blocks) // 2
            blocks[middle:middle] = [blocks[middle]] * (depth - len(blocks))
        return Layout(tuple(root.values()), tuple(blocks))

    @property
    def parameters(self) -> list[Held]:
        """All of them."""
        return [held for unit in (self.root, *self.blocks) for held in unit]

    def weights(self, ranks: int = 1) -> int:
        """Bytes of a rank's shards, each in a storage of its own; with one rank all weights."""
        return sum(rounded(held.nbytes(ranks)) for held in self.parameters)

    def gradients(self, ranks: int = 1) -> int:
        """Bytes of a rank's shards of gradients: one storage for each unit."""
        return sum(rounded(_trained(unit, ranks)) for unit in (self.root, *self.blocks))


def _trained(unit: Unit, ranks: int = 1) -> int:
    return sum(held.nbytes(ranks) for held in unit if held.trained)


def _gathered(unit: Unit, ranks: int) -> int:
    return ranks * sum(held.nbytes(ranks) for held in unit)


# ------------------------------------------------------------------ ddp


def replicated(simulation: Simulation) -> Simulation:
    """A rank of ``ddp``: the same, and buckets in every moment."""
    buckets = simulation.gradients
    moments = {
        name: parts | {"temporary": parts["temporary"] + buckets}
        for name, parts in simulation.moments.items()
    }
    return _with_moments(simulation, moments, dict.fromkeys(moments, buckets))


# ------------------------------------------------------------------ fsdp2


def sharded(simulation: Simulation, layout: Layout, ranks: int) -> Simulation:
    """A rank of ``fsdp2``: forward and backward passes of one process, turned."""
    weights = simulation.weights - layout.weights() + layout.weights(ranks)
    gradients = layout.gradients(ranks)
    share = gradients / (simulation.gradients or 1)
    whole_until_the_end = simulation.setup.accumulation > 1
    moments, exchanged = {}, {}
    for name, parts in simulation.moments.items():
        gathered, unreduced = _in_flight(name, layout, ranks)
        now = parts["gradients"]
        whole = min(now, unreduced)
        if whole_until_the_end and name != OPTIMIZER:
            whole = now
        more = {
            "weights": weights,
            "gradients": round(whole + (now - whole) * share),
            "temporary": gathered
            + (round(parts["temporary"] / ranks) if name == OPTIMIZER else parts["temporary"]),
        }
        moments[name] = parts | more
        exchanged[name] = gathered
    turned = replace(simulation, weights=weights, gradients=gradients)
    return _with_moments(turned, moments, exchanged)


def _in_flight(segment: str, layout: Layout, ranks: int) -> tuple[int, int]:
    """Bytes gathered or to be reduced in a segment, and of gradients that are whole in it."""
    phase, _, place = segment.partition(":")
    place = place.rpartition("/")[2]
    root = _gathered(layout.root, ranks)
    block = max((_gathered(unit, ranks) for unit in layout.blocks), default=0)
    reducing = ranks * max((_trained(unit, ranks) for unit in layout.blocks), default=0)
    own = max(map(_trained, layout.blocks), default=0)
    late = _trained(tuple(held for held in layout.root if held.late))
    if phase == "forward":
        in_forward = {"": 2 * root + block, "after": root + block}
        return in_forward.get(place, root + 2 * block), 0
    if phase != "backward":
        return 0, 0
    of_root = _trained(layout.root)
    if not layout.blocks:
        return root, of_root
    if place == "":
        return root + block, late
    if place == "before":  # at its end the root is no longer gathered, but reduced
        return max(root + reducing, ranks * _trained(layout.root, ranks)), of_root
    former = 0 if place == "last" else reducing
    ahead = 0 if place == "first" else block
    return root + block + ahead + former, late + own


def sharded_step(
    step: Simulation, layout: Layout, ranks: int, device: str, batch_bytes: int
) -> Simulation:
    """A rank's optimizer step: torch's own on shards, simulated.

    What is folded after it is local to a shard, and takes its share of one process's temporaries.
    """
    world = FakeWorld()
    with world:
        shards = nn.ParameterList(
            torch.empty(held.shard(ranks), dtype=held.dtype)
            for held in layout.parameters
            if held.trained
        )
        optimizer = make_optimizer(step.setup.optimizer, shards)
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = device == "cuda"
        trace = track(
            shards,
            optimizer,
            lambda: torch.stack([p.sum().float() for p in shards]).sum(),
            [],
            steps=2,
        )
    peaks = [p.by_category() for n, p in trace.peaks.items() if n.startswith(OPTIMIZER)]
    temporary = max(parts["temporary"] for parts in peaks)
    alone = step.moments[OPTIMIZER]
    moment: ByCategory = alone | {
        "weights": step.weights - layout.weights() + layout.weights(ranks),
        "gradients": layout.gradients(ranks),
        "optimizer_state": trace.optimizer_state,
        "saved_activations": batch_bytes,
        "logits": 0,
        "temporary": max(temporary, alone["temporary"] // ranks),
    }
    turned = replace(
        step,
        weights=moment["weights"],
        gradients=moment["gradients"],
        optimizer_state=moment["optimizer_state"],
    )
    return _with_moments(turned, {OPTIMIZER: moment}, {OPTIMIZER: 0})


def _with_moments(
    simulation: Simulation, moments: dict[str, ByCategory], exchanged: Mapping[str, int]
) -> Simulation:
    segments = {name: sum(parts.values()) for name, parts in moments.items()}
    at = max(segments, key=lambda name: segments[name])
    return replace(
        simulation,
        moments=moments,
        segments=segments,
        peak_bytes=segments[at],
        peak=moments[at],
        peak_at=where(at),
        exchanged=exchanged[at],
    )
