"""Which layers of a recipe's model are looked at, their kinds, and into how many groups they go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from velora_torch.config import VeloraConfig
from velora_torch.layers import linear_shape
from velora_torch.layers.scale_shift import ScaleShift
from velora_torch.selection import select
from velora_torch.training.schema import Recipe


@dataclass(frozen=True)
class Layer:
    """A layer to look at."""

    name: str
    module: nn.Module
    kind: str
    outputs: int
    features: int
    sizes: tuple[tuple[int, int], ...]
    """(G, M) for each number of groups that it has enough features for."""


@dataclass(frozen=True)
class Layers:
    """Layers to look at, and what was left out of them."""

    found: dict[str, Layer]
    skipped: dict[str, str]
    """Layers, or numbers of groups in a kind of layers -> why."""


def layers_of(model: nn.Module, recipe: Recipe, groups: Sequence[int]) -> Layers:
    """The layers that the recipe's `velora.targets` would compress, and can be looked at.

    Raises:
        ValueError: nothing can be compressed, or no layer has enough features for any of the
            numbers of groups.
    """
    targets = "all-linear" if recipe.velora is None else recipe.velora.targets
    selection = select(model, VeloraConfig(targets=targets, num_groups=1))
    skipped = {
        adapter.unit.name: "an adapter that multiplies with parameters of its own"
        for adapter in selection.adapters
    }
    modules = {}
    for chosen in selection.chosen:
        if isinstance(chosen.module, ScaleShift):
            skipped[chosen.name] = "a scale of features: its gradient is no product of matrices"
        elif chosen.dormant:
            skipped[chosen.name] = "belongs to an adapter that is not active"
        else:
            modules[chosen.name] = chosen.module
    kinds = kinds_of(modules)
    found = {}
    for name, module in modules.items():
        outputs, features = linear_shape(module)
        sizes = []
        for count in groups:
            try:
                sizes.append(VeloraConfig(num_groups=count).groups(name, features))
            except ValueError:
                what = f"{count} groups in {kinds[name]}"
                skipped[what] = f"more than the layers' {features} input features"
        if sizes:
            found[name] = Layer(name, module, kinds[name], outputs, features, tuple(sizes))
    if not found:
        reasons = "\n  ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:8])
        raise ValueError(f"nothing is left to analyze:\n  {reasons}")
    return Layers(found, skipped)


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """What a layer is called in its block, such as ``v_proj``: the same for all blocks.

    It is the shortest end of a dotted name, without numbers, that layers of another place in the
    block do not have: ``query``, but ``attention.output.dense`` beside ``layer.output.dense``.
    """
    plain = {name: re.sub(r"(^|\.)\d+(?=\.|$)", "", name).strip(".") for name in names}
    places = set(plain.values())
    kinds = {}
    for place in places:
        parts = place.split(".")
        for length in range(1, len(parts) + 1):
            end = ".".join(parts[-length:])
            alike = [other for other in places if f".{other}".endswith(f".{end}")]
            if alike == [place] or length == len(parts):
                kinds[place] = end
                break
    return {name: kinds[place] or name for name, place in plain.items()}
