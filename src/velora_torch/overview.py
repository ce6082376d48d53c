"""What of a model is compressed, what is not, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from velora_torch.config import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.model import compressed_layers
from velora_torch.selection import LATER, PLAIN, Selector

ROOT = "(root)"
"""The name of the model itself in tables."""


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
        lines.append(f"{len(self.exact)} layers exact")
        reasons: dict[tuple[str, str], int] = Counter(
            (name.rsplit(".", 1)[-1], reason) for name, reason in self.exact.items()
        )
        lines += [f"  {n:4} x {kind or ROOT}: {why}" for (kind, why), n in reasons.items()]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """What is compressed, what is not, and why. Works on plain models too."""
    layers = compressed_layers(model)
    config = next(iter(layers.values())).velora.config if layers else VeloraConfig()
    selector = Selector(model, config)
    exact = {
        name: selector.why_exact(name, module) or (LATER if layers else PLAIN)
        for name, module in selector.holders.items()
        if name not in layers
    }
    return Summary({name: _describe(layer) for name, layer in layers.items()}, exact)


def _describe(layer: CompressedLayer) -> LayerSummary:
    state, coef = layer.velora, layer._parameters["coef"]
    weights = layer.raw_weight.numel()
    return LayerSummary(
        layer.outputs,
        layer.features,
        state.groups,
        state.size,
        state.config.gradient,
        weights,
        weights if coef is None else coef.numel(),
        state.pending,
    )
