"""The vectors that the library would use for a layer, for every choice of v, while it trains.

The functions that make vectors are those of `velora_torch.subtoken.vectors`, and so is the order:
a fixed choice comes from the layer's first batch, a moving one from the first pass of each step.

Shapes: T tokens, D input features, G groups, M features per sub-token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from velora_torch.config import RANDOM, Init, Vectors
from velora_torch.subtoken import vectors as choose

MOVING = ("running_average", "batch_average")
"""Choices that are the same as ``average`` in the first step."""


@dataclass(frozen=True)
class Choice:
    """One way to choose v, in the words of `velora_torch.VeloraConfig`."""

    init: Init
    vectors: Vectors

    @property
    def label(self) -> str:
        """As plots and tables name it."""
        name = self.init.replace("_", " ")
        return name if self.vectors == "shared" else f"{name}, per group"


def choices(steps: Sequence[int]) -> list[Choice]:
    """Every choice; moving averages only where a step after the first is looked at."""
    inits = [init for init in get_args(Init) if steps[-1] > 0 or init not in MOVING]
    return [Choice(init, vectors) for vectors in get_args(Vectors) for init in inits]


class LayerVectors:
    """What a layer has seen, from which its vectors follow.

    Args:
        name: of the layer; random vectors depend on it.
        seed: the configuration's seed.
        decay: weight of the past in the running average.
    """

    def __init__(self, name: str, seed: int, decay: float) -> None:
        self._name, self._seed, self._decay = name, seed, decay
        self._means: dict[str, Tensor] = {}
        self._singular: dict[tuple[int, bool], Tensor] = {}

    def see_mean(self, mean_D: Tensor) -> None:
        """Take the mean token of the first batch of one more step."""
        mean_D = mean_D.double()
        means = self._means
        means["batch_average"] = mean_D
        means.setdefault("average", mean_D)
        past = means.setdefault("running_average", mean_D)
        if past is not mean_D and torch.isfinite(mean_D).all():
            means["running_average"] = self._decay * past + (1 - self._decay) * mean_D

    def see_tokens(self, x_TD: Tensor, sizes: Iterable[tuple[int, int]]) -> None:
        """Take singular vectors for each (G, M) from tokens, unless there are some already."""
        for groups, size in sizes:
            for per_group in (False, True):
                if (groups, per_group) not in self._singular:
                    raw = choose.singular(x_TD, groups, size, per_group, torch.float64)
                    self._singular[groups, per_group] = raw

    def vectors(self, choice: Choice, groups: int, size: int) -> Tensor:
        """Unit vectors, (G, M) in float64, for the newest batch that was seen."""
        features = len(self._means["average"])
        mask_GM = choose.feature_mask(groups, size, features, torch.device("cpu"))
        raw_GM = self._raw(choice, mask_GM)
        return choose.normalise(raw_GM, mask_GM, choose.uniform(mask_GM, torch.float64))[0]

    def _raw(self, choice: Choice, mask_GM: Tensor) -> Tensor:
        groups, size = mask_GM.shape
        per_group = choice.vectors == "per_group"
        if choice.init in RANDOM:
            shape, dtype = (groups, size), torch.float32  # in which the layer draws: same vectors
            name, seed = self._name, self._seed
            return choose.random(name, seed, 0, shape, per_group, dtype, choice.init)
        if choice.init == "svd":
            return self._singular[groups, per_group]
        mean_D = self._means[choice.init]
        raw_GM = choose.mean_sub_token(mean_D[None], groups, size, torch.float64)
        return raw_GM if per_group else choose.share(raw_GM, mask_GM)
