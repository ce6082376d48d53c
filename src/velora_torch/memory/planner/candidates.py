"""One way to train that fits, and how a plan orders several."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from velora_torch.config import VeloraConfig
from velora_torch.memory.planner.ranks import Ranks
from velora_torch.memory.simulator.presets import PRESETS
from velora_torch.memory.simulator.setup import Setup
from velora_torch.memory.simulator.simulate import Coarseness, Simulation

RECIPE_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "sgd": "sgd",
}
"""Names that recipes have for simulated optimizers; the others have none."""

TRAINABLE_PRESETS = ("smollm2-135m-instruct",)
"""Presets that ``velora train`` has weights for."""


@dataclass(frozen=True)
class Candidate:
    """A setup with its predicted step."""

    simulation: Simulation
    step_cost: float
    """FLOPs of the step over those of the method's plain step, without any saving: 1.0 = plain."""
    fits: bool
    dtype: str = "bfloat16"
    largest: int | None = None
    """The largest batch or sequence that fits, where it was searched."""
    source: str | None = None
    """The model as a recipe names it, if it can."""
    ranks: Ranks = field(default_factory=Ranks)
    """Processes that train together; all bytes are those of one, and the batch is its own."""

    @property
    def setup(self) -> Setup:
        """How it is trained."""
        return self.simulation.setup

    @property
    def peak_bytes(self) -> int:
        """The largest moment of a step."""
        return self.simulation.peak_bytes

    @property
    def peak_gib(self) -> float:
        """The same in GiB."""
        return self.peak_bytes / 2**30

    @property
    def coarseness(self) -> Coarseness:
        """How much of the weight gradient is approximated."""
        return self.simulation.coarseness

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings of a recipe for ``velora train`` that make this step."""
        recipe: dict[str, Any] = {} if self.source is None else {"model": self.source}
        recipe |= {"dtype": self.dtype, "method": self.setup.method}
        recipe["velora"] = _velora(self.setup.velora)
        if self.setup.method != "full":
            targets = self.setup.lora_targets
            recipe["lora"] = {
                "r": self.setup.lora_rank,
                "dropout": self.setup.lora_dropout,
                "targets": targets if isinstance(targets, str) else list(targets),
            }
        if self.simulation.seq is not None:
            recipe["data"] = {"max_length": self.simulation.seq}
        recipe["train"] = self._train()
        return recipe

    def _train(self) -> dict[str, Any]:
        setup = self.setup
        train: dict[str, Any] = {}
        if self.simulation.batch is not None:
            train["batch_size"] = self.simulation.batch
        if setup.accumulation > 1:
            train["accumulation"] = setup.accumulation
        every = setup.checkpoint_every
        train["gradient_checkpointing"] = False if every is None else every if every > 1 else True
        train["recompute"] = setup.recompute
        train["chunked_loss"] = setup.chunked_loss
        if setup.optimizer in RECIPE_OPTIMIZERS:
            train["optimizer"] = RECIPE_OPTIMIZERS[setup.optimizer]
        return train

    @property
    def recipe_lines(self) -> str:
        """The same as YAML; an optimizer that recipes lack is a comment."""
        import yaml

        lines = yaml.safe_dump(self.recipe, sort_keys=False, width=100)
        if self.setup.optimizer not in RECIPE_OPTIMIZERS:
            lines += f"# optimizer {self.setup.optimizer}: recipes have no setting for it\n"
        return lines

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: bytes by category, cost by kind of product, the recipe's lines."""
        flops = self.simulation.flops
        return {
            "setup": str(self.setup),
            "peak_gib": self.peak_gib,
            "step_cost": self.step_cost,
            "fits": self.fits,
            "batch": self.simulation.batch,
            "seq": self.simulation.seq,
            "largest": self.largest,
            "peak_bytes": self.peak_bytes,
            "peak_at": self.simulation.peak_at,
            "peak": self.simulation.peak,
            "weights_bytes": self.simulation.weights,
            "saved_bytes": self.simulation.saved,
            "gradient_bytes": self.simulation.gradients,
            "optimizer_bytes": self.simulation.optimizer_state,
            "flops": {**vars(flops), "total": flops.total},
            "approximated": {
                "share_of_weights": self.coarseness.share,
                "times_smaller": self.coarseness.factor,
            },
            "gpus": self.ranks.count,
            "strategy": self.ranks.strategy,
            "exchange_bytes": self.simulation.exchanged,
            "estimated": list(self.simulation.estimated),
            "recipe": self.recipe_lines,
        }

    def rank(self, optimizers: tuple[str, ...]) -> tuple[Any, ...]:
        """What candidates are sorted by: the largest size if searched, then the fastest.

        Among those equally fast, to a percent, the gradients that drop least come first, exact
        ones before all, then the preferred optimizer.
        """
        return (
            -(self.largest or 0),
            round(self.step_cost, 2),
            self.coarseness.dropped,
            optimizers.index(self.setup.optimizer),
            self.peak_bytes,
        )


def source_of(model: Any) -> str | None:
    """How a recipe names a model, if it has weights and a name."""
    if not isinstance(model, (str, Path)):
        return None
    name = str(model)
    if name in PRESETS:
        return name if name in TRAINABLE_PRESETS else None
    return str(Path(name).parent) if Path(name).name == "config.json" else name


def _velora(config: VeloraConfig | None) -> dict[str, Any] | None:
    """What differs from the defaults."""
    if config is None:
        return None
    defaults = VeloraConfig().to_dict() | {"num_groups": None}
    values = config.to_dict()
    kept = {key: value for key, value in values.items() if value != defaults[key]}
    return {"targets": values["targets"], **kept}
