"""Finds the ways to train that fit, the fastest first, with as few simulations as it can.

The arithmetic of a step depends on what is compressed and on which blocks are checkpointed, hardly
on the rest. So the search goes through such pairs by their cost, leaves out those that do not fit
with all else saved, and gives each that does the preferred optimizer and as few other savings as
it can. What a setup holds for certain (weights, gradients, states, and the activations of so many
blocks) rules out many without a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn

from velora_torch.config import VeloraConfig
from velora_torch.memory.planner.predictor import Predictor, Size
from velora_torch.memory.planner.space import Holdings, Saving, Space
from velora_torch.memory.simulator.setup import Setup
from velora_torch.memory.simulator.simulate import Simulation

SURE = 0.98
"""Share of what should be saved that certainly is: blocks may share what they save."""


@dataclass(frozen=True)
class Pair:
    """What decides on a step's arithmetic."""

    velora: VeloraConfig | None
    every: int | None
    """Which blocks are checkpointed."""
    held: Holdings
    """Weights and gradients with that compression."""


@dataclass
class Search:
    """One search for one model, size and budget."""

    space: Space
    predictor: Predictor
    model: nn.Module
    """The whole model, prepared without savings; for arithmetic alone."""
    holdings: Holdings
    size: Size
    budget: int
    skipped: dict[str, str] = field(default_factory=dict)
    """Setups that cannot be simulated or built, and why."""

    def __post_init__(self) -> None:
        self._held = [
            (velora, self.holdings.with_velora(self.model, velora).of_rank(self.predictor.ranks))
            for velora in self.space.velora
        ]
        self._enough: dict[tuple[int, str], int] = {}

    def fitting(self, most: int | None) -> list[Simulation]:
        """One fitting setup for each of the cheapest pairs, at most so many."""
        found: list[Simulation] = []
        for pair in self._pairs():
            best = self._least_saving(pair)
            if best is not None:
                found.append(best)
            if most is not None and len(found) >= most:
                break
        return found

    def chains(self) -> Iterator[list[Setup]]:
        """For each compression and optimizer, all else saved, setups with ever fewer checkpoints.

        What a setup holds grows along a chain, and its cost falls.
        """
        for velora, held in self._held:
            for optimizer in self.space.optimizers_for(velora):
                if held.at_least(optimizer) > self.budget:
                    continue
                yield [
                    self._setup(Pair(velora, every, held), self.space.levels[-1], optimizer)
                    for every in reversed(self.space.checkpoint_every)
                ]

    def smallest(self) -> Simulation | None:
        """The smallest of all setups; a bound by arithmetic saves simulating the hopeless ones."""
        best: Simulation | None = None
        bounds = [
            (held.at_least(optimizer), velora, held, optimizer)
            for velora, held in self._held
            for optimizer in self.space.optimizers_for(velora)
        ]
        for bound, velora, held, optimizer in sorted(bounds, key=lambda item: item[0]):
            if best is not None and bound >= best.peak_bytes:
                break
            for every in dict.fromkeys(self.space.checkpoint_every[i] for i in (-1, 0)):
                pair = Pair(velora, every, held)
                found = self.predict(self._setup(pair, self.space.levels[-1], optimizer))
                if found is not None and (best is None or found.peak_bytes < best.peak_bytes):
                    best = found
        return best

    def predict(self, setup: Setup, size: Size | None = None) -> Simulation | None:
        """The step of a setup; ``None`` where it cannot be simulated, which is noted."""
        return self._noting(setup, lambda: self.predictor.predict(setup, size or self.size))

    def fits(self, setup: Setup) -> bool:
        """Whether the step of a setup stays within the budget."""
        found = self.predict(setup)
        return found is not None and found.peak_bytes <= self.budget

    # ------------------------------------------------------------------ pairs

    def _pairs(self) -> list[Pair]:
        """Pairs by cost; a compression that does not fit with all else saved has none.

        Costs within a percent are the same: the gradients that drop least come first then, as in
        `Candidate.rank`.
        """
        least, most = self.space.checkpoint_every[0], self.space.checkpoint_every[-1]
        level = self.space.levels[-1]
        costs: list[tuple[float, int, int, Pair]] = []
        for velora, held in self._held:
            optimizers = self.space.optimizers_for(velora)
            for every in dict.fromkeys((least, most)):
                pair = Pair(velora, every, held)
                if any(self._fits(pair, level, optimizer) for optimizer in optimizers):
                    for other, cost in self._costs(pair):
                        costs.append((cost, -held.numbers, len(costs), other))
                    break
        return [pair for *_, pair in sorted(costs, key=lambda cost: cost[:3])]

    def _costs(self, pair: Pair) -> Iterator[tuple[Pair, float]]:
        """FLOPs of a compression's pairs over the plain ones, from one of its pairs.

        Checkpointed blocks repeat their share of the forward pass.
        """
        passes = self._passes(self._setup(pair, self.space.levels[-1], "sgd"))
        plain = self.predictor.passes(self.space.base.plain(), self.size)
        assert passes is not None
        once = passes.flops.total - passes.flops.recompute
        for every in self.space.checkpoint_every:
            again = self.space.share(every) * passes.flops.forward
            cost = round((once + again) / (plain.flops.total or 1), 2)
            yield Pair(pair.velora, every, pair.held), cost

    def _least_saving(self, pair: Pair) -> Simulation | None:
        """The first optimizer that fits, with the first level that does.

        Levels that fit with fewer checkpoints fit with more.
        """
        levels = self.space.levels
        for optimizer in self.space.optimizers_for(pair.velora):
            key = (id(pair.velora), optimizer)
            if key not in self._enough and not self._fits(pair, levels[-1], optimizer):
                continue
            enough = self._enough.get(key, len(levels) - 1)
            for index, level in enumerate(levels[: enough + 1]):
                if self._fits(pair, level, optimizer):
                    self._enough[key] = index
                    return self.predict(self._setup(pair, level, optimizer))
        return None

    # ------------------------------------------------------------------ whether it fits

    def _fits(self, pair: Pair, level: tuple[bool, bool], optimizer: str) -> bool:
        """Whether a step stays within the budget; asks the cheapest question first."""
        room = self.budget - pair.held.states(optimizer)
        if pair.held.at_least(optimizer) > self.budget:
            return False
        known = (id(pair.velora), optimizer) in self._enough
        if not known and self._saves_too_little(pair, room):
            return False
        setup = self._setup(pair, level, optimizer)
        passes = self._passes(setup)
        return passes is not None and passes.peak_bytes <= room and self.fits(setup)

    def _saves_too_little(self, pair: Pair, room: int) -> bool:
        """Whether what the forward pass of some checkpointed blocks saves is too much.

        Every block adds what it saves: so much if checkpointed, so much if not.
        """
        share = self.space.share(pair.every)
        if not 0 < share < 1 or None not in self.space.checkpoint_every:
            return False
        if 1 not in self.space.checkpoint_every:
            return False
        none, every = (
            self._passes(self._setup(Pair(pair.velora, n, pair.held), self.space.levels[-1], "sgd"))
            for n in (None, 1)
        )
        if none is None or every is None:
            return False
        saved = none.saved + share * (every.saved - none.saved)
        return none.weights + SURE * saved > room

    def _passes(self, setup: Setup) -> Simulation | None:
        return self._noting(setup, lambda: self.predictor.passes(setup, self.size))

    def _noting(self, setup: Setup, simulate: Callable[[], Simulation]) -> Simulation | None:
        if str(setup) in self.skipped:
            return None
        try:
            return simulate()
        except ValueError as error:  # the plain step was possible, so this setup is at fault
            self.skipped[str(setup)] = str(error)
        return None

    def _setup(self, pair: Pair, level: tuple[bool, bool], optimizer: str) -> Setup:
        return Saving(pair.velora, pair.every, *level, optimizer).of(self.space.base)
