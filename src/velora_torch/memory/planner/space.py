"""What a plan may choose from: layers to compress, checkpoints, recomputation, optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from velora_torch.config import Purpose, VeloraConfig
from velora_torch.layers import linear_shape
from velora_torch.memory.planner.ranks import Ranks
from velora_torch.memory.simulator.setup import Setup
from velora_torch.recomputation import recompute, recomputed, undo_recompute
from velora_torch.selection import select

DEFAULT_OPTIMIZERS = ("adamw_fused", "adamw_8bit")
"""Fused AdamW is what the trainer takes, computes what AdamW does, and needs no temporaries."""
SUB_TOKEN_SIZES: dict[Purpose, tuple[int, ...]] = {"full": (8, 32), "lora": (4,)}
"""M that plans try: of all weights what is recommended, and four times as much; of adapters, which
lose more with a larger one, the former alone."""

# Last parts of the usual names of layers. A model that has none of them gets "all-linear" alone.
VALUE = ("v_proj", "value", "v", "to_v", "v_lin", "value_proj")
QUERY_AND_KEY = ("q_proj", "k_proj", "query", "key", "q", "k", "to_q", "to_k", "q_lin", "k_lin")
DOWN = ("down_proj", "fc2", "wo", "w2", "mlp.c_proj", "dense_4h_to_h", "lin2", "output.dense")

ADAPTER_PARTS = ("lora_A", "lora_B", "base_layer", "default")


@dataclass(frozen=True)
class Saving:
    """One combination of what makes a step smaller; exact but for ``velora``."""

    velora: VeloraConfig | None
    checkpoint_every: int | None
    recompute: bool
    chunked_loss: bool
    optimizer: str

    def of(self, setup: Setup) -> Setup:
        """A setup with these settings."""
        return replace(setup, **{f.name: getattr(self, f.name) for f in fields(self)})


SAVINGS = tuple(f.name for f in fields(Saving))


@dataclass(frozen=True)
class Space:
    """All combinations that a plan looks at; each dimension from the least saving to the most."""

    base: Setup
    """Method, adapters and whatever else is given."""
    velora: tuple[VeloraConfig | None, ...]
    checkpoint_every: tuple[int | None, ...]
    levels: tuple[tuple[bool, bool], ...]
    """Pairs (recompute, chunked_loss), by their cost."""
    optimizers: tuple[str, ...]
    """In order of preference."""
    blocks: int = 0
    """Repeated blocks of the model."""

    def optimizers_for(self, velora: VeloraConfig | None) -> list[str]:
        """GaLore projects weight gradients, which a factored layer does not have."""
        factored = velora is not None and velora.gradient == "factored"
        return [name for name in self.optimizers if not (factored and name == "galore_adamw")]

    def share(self, every: int | None) -> float:
        """The share of the blocks that are checkpointed."""
        return 0.0 if every is None else -(-self.blocks // every) / max(self.blocks, 1)


def make_space(
    model: nn.Module,
    blocks: int,
    base: Setup,
    optimizers: Sequence[str] | None,
    fixed: dict[str, Any],
) -> Space:
    """The space for a model.

    Args:
        model: prepared as ``base`` says, without any saving; a few of its blocks do.
        blocks: all of its repeated blocks.
        base: what all combinations share.
        optimizers: names of ``OPTIMIZERS``, the preferred one first.
        fixed: settings of :class:`Saving` that are given, and not searched.
    """
    names = tuple(dict.fromkeys(DEFAULT_OPTIMIZERS if optimizers is None else optimizers))
    for name in names:
        replace(base, optimizer=name)  # which refuses unknown names, naming the known ones
    every = tuple(n for n in (None, 4, 2, 1) if n is None or blocks >= max(n, 2))
    levels = _levels(model)

    def given(name: str, choices: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fixed[name],) if name in fixed else choices

    recomputes = given("recompute", tuple(dict.fromkeys(r for r, _ in levels)))
    chunks = given("chunked_loss", tuple(dict.fromkeys(c for _, c in levels)))
    return Space(
        base,
        (fixed["velora"],) if "velora" in fixed else tuple(_configs(model, base.method)),
        given("checkpoint_every", every),
        tuple((r, c) for c in chunks for r in recomputes),
        given("optimizer", names),
        blocks,
    )


def layer_sets(model: nn.Module) -> list[str | tuple[str, ...]]:
    """Sets of layers worth compressing, the smallest first: value and down, all but query and key.

    Names are those that the model has; layers inside of adapters go by the adapted layer's name.
    """
    names = [layer.name for layer in select(model, VeloraConfig(num_groups=1)).chosen]
    endings = dict.fromkeys(filter(None, map(_ending, names)))
    has = lambda part: any(f".{name}.".endswith(f".{part}.") for name in map(_adapted, names))  # noqa: E731
    value = [part for part in VALUE if has(part)][:1]
    down = [part for part in DOWN if has(part)][:1]
    sets: list[str | tuple[str, ...]] = []
    if value and down:
        sets.append((*value, *down))
    rest = tuple(name for name in endings if name not in QUERY_AND_KEY)
    if rest and len(rest) < len(endings):
        sets.append(rest)
    return [*sets, "all-linear"]


def _adapted(name: str) -> str:
    """``layers.0.v_proj`` of ``layers.0.v_proj.lora_A.default``."""
    parts = name.split(".")
    while parts and parts[-1] in ADAPTER_PARTS:
        parts.pop()
    return ".".join(parts)


def _ending(name: str) -> str:
    return _adapted(name).rpartition(".")[2]


def _configs(model: nn.Module, method: str) -> list[VeloraConfig | None]:
    """No compression, then each set of layers with each size of sub-tokens that fits."""
    purpose: Purpose = "full" if method == "full" else "lora"
    configs = [
        VeloraConfig.recommended(purpose, targets=targets, sub_token_size=size, track_delta=False)
        for targets in layer_sets(model)
        for size in SUB_TOKEN_SIZES[purpose]
    ]
    return [None, *(config for config in configs if _selects(model, config))]


def _selects(model: nn.Module, config: VeloraConfig) -> bool:
    try:
        select(model, config)
    except ValueError:  # groups wider than a layer
        return False
    return True


def _levels(model: nn.Module) -> tuple[tuple[bool, bool], ...]:
    """(recompute, chunked_loss), where the model has something to recompute or to cut."""
    kinds = set(recomputed(recompute(model)).values())
    undo_recompute(model)
    chunks = (False, True) if "chunked loss" in kinds else (False,)
    again = (False, True) if kinds - {"chunked loss"} else (False,)
    return tuple((r, c) for c in chunks for r in again)


@dataclass(frozen=True)
class Holdings:
    """What a prepared model holds for certain, before any activation."""

    weights: int
    trained: int
    """Bytes of the weights that are trained: that much gradient."""
    numbers: int

    @staticmethod
    def of(model: nn.Module) -> Holdings:
        """Of a model prepared without any saving."""
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        trained = [p for p in model.parameters() if p.requires_grad]
        return Holdings(
            sum(-(-t.nbytes // 512) * 512 for t in tensors.values()),
            sum(p.nbytes for p in trained),
            sum(p.numel() for p in trained),
        )

    def with_velora(self, model: nn.Module, velora: VeloraConfig | None) -> Holdings:
        """The same after compression, of which vectors are left out."""
        weights, trained, numbers = self.weights, self.trained, self.numbers
        if velora is not None and velora.gradient == "factored":
            for layer in select(model, velora).chosen:
                weight = layer.module._parameters["weight"]
                assert weight is not None
                kept = linear_shape(layer.module)[0] * layer.groups
                size = torch.promote_types(weight.dtype, torch.float32).itemsize
                weights += kept * size
                trained += kept * size - weight.nbytes
                numbers += kept - weight.numel()
        return Holdings(weights, trained, numbers)

    def of_rank(self, ranks: Ranks) -> Holdings:
        """At least so much of it on each of several ranks."""
        if not ranks.shards:
            return self
        return Holdings(*(n // ranks.count for n in (self.weights, self.trained, self.numbers)))

    def states(self, optimizer: str) -> int:
        """At least so many bytes of optimizer states."""
        if optimizer == "adamw_8bit":
            return 2 * self.numbers
        return {"adamw": 2, "adamw_fused": 2, "sgd_momentum": 1}.get(optimizer, 0) * self.trained

    def at_least(self, optimizer: str) -> int:
        """A lower bound of the peak, by arithmetic: an optimizer's step needs all three."""
        return self.weights + self.trained + self.states(optimizer)
