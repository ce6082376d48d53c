"""What of a model is compressed, what is not, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from velora_torch.config import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.layers.adapter import compressed_adapters
from velora_torch.model import compressed_layers
from velora_torch.selection import LATER, PLAIN, ChosenAdapter, Selector

ROOT = "(root)"
"""The name of the model itself in tables."""
UNCALLED = "not called in training so far: where other code uses its weight, its input is kept"


@dataclass(frozen=True)
class LayerSummary:
    """One compressed layer."""

    outputs: int
    features: int
    groups: int
    size: int
    gradient: str
    weights: int
    trainable: int
    pending: bool
    uncalled: bool = False
    """It trains, but its forward has not run in training: other code uses its weight, so that
    only its gradient shrinks and its input is kept, or its turn has not come yet."""


@dataclass(frozen=True)
class Summary:
    """Compressed layers and exact ones, by name. ``print`` it for a table."""

    compressed: dict[str, LayerSummary]
    exact: dict[str, str]

    def __str__(self) -> str:
        """A short table: equal rows are counted, not repeated."""
        weights = sum(layer.weights for layer in self.compressed.values())
        trainable = sum(layer.trainable for layer in self.compressed.values())
        lines = [
            f"{len(self.compressed)} layers compressed: {weights:,} weights are trained by "
            f"{trainable:,} numbers"
        ]
        rows = Counter(
            (name.rsplit(".", 1)[-1], layer.features, layer.outputs, layer.groups, layer.size)
            for name, layer in self.compressed.items()
        )
        for (kind, features, outputs, groups, size), count in rows.items():
            lines.append(
                f"  {count:4} x {kind or ROOT}  {features} -> {outputs}  {groups} groups of {size}"
            )
        uncalled = Counter(
            name.rsplit(".", 1)[-1] for name, layer in self.compressed.items() if layer.uncalled
        )
        lines += [f"  {n:4} x {kind or ROOT}: {UNCALLED}" for kind, n in uncalled.items()]
        lines.append(f"{len(self.exact)} layers exact")
        reasons: dict[tuple[str, str], int] = Counter(
            (name.rsplit(".", 1)[-1], reason) for name, reason in self.exact.items()
        )
        lines += [f"  {n:4} x {kind or ROOT}: {why}" for (kind, why), n in reasons.items()]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """What is compressed, what is not, and why. Works on plain models too."""
    layers = compressed_layers(model)
    adapters = compressed_adapters(model)
    configs = [layer.velora.config for layer in layers.values()]
    configs += [adapter.velora_adapter.config for adapter in adapters.values()]
    config = configs[0] if configs else VeloraConfig()
    selector = Selector(model, config)
    exact = {
        name: selector.why_exact(name, module) or (LATER if configs else PLAIN)
        for name, module in selector.holders.items()
        if name not in layers
    }
    compressed = {name: _describe(layer) for name, layer in layers.items()}
    for chosen in selector.adapters():
        if chosen.unit.name in adapters:
            compressed[chosen.unit.name] = _describe_adapter(chosen, config)
            exact = {name: why for name, why in exact.items() if name not in chosen.parts}
    return Summary(compressed, exact)


def _describe_adapter(chosen: ChosenAdapter, config: VeloraConfig) -> LayerSummary:
    unit = chosen.unit
    groups, size = config.groups(unit.name, chosen.widths[0])
    parts = [unit.parts[name] for name in chosen.parts]
    trained = sum(p.numel() for part in parts for p in part.parameters(recurse=False))
    return LayerSummary(unit.outputs, unit.features, groups, size, "dense", trained, trained, False)


def _describe(layer: CompressedLayer) -> LayerSummary:
    state, coef = layer.velora, layer._parameters["coef"]
    # A quantised weight packs them; a scale has one for each feature.
    weights = layer.outputs * layer.features if layer.factors else layer.features
    return LayerSummary(
        layer.outputs,
        layer.features,
        state.groups,
        state.size,
        state.config.gradient if layer.factors else "dense",
        weights,
        weights if coef is None else coef.numel(),
        state.pending,
        # A forward in training draws vectors; random ones need none.
        uncalled=state.steps > 0 and not state.drawn,
    )
