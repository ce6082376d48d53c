"""All measures of one layer in one step, as rows of the result, and the curves of all layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from velora_torch.analysis import measures, similarity
from velora_torch.analysis.capture import Captured
from velora_torch.analysis.choices import Choice, LayerVectors
from velora_torch.analysis.layers import Layer
from velora_torch.analysis.results import Curve, Projection, Rank, Sample
from velora_torch.subtoken.vectors import layer_seed

DIGITS = 6
"""Significant digits of a written number."""
_Place = tuple[int, int, Choice]
"""Step, groups, choice of v."""


class Table:
    """Rows that grow layer by layer.

    Args:
        choices: of v, to measure for every layer.
        seed: of the pairs of sub-tokens.
    """

    def __init__(self, choices: Sequence[Choice], seed: int) -> None:
        self._choices, self._seed = choices, seed
        self.samples: list[Sample] = []
        self.ranks: list[Rank] = []
        self.projections: list[Projection] = []
        self._changes: dict[_Place, list[similarity.Change]] = defaultdict(list)

    def add(self, step: int, layer: Layer, captured: Captured, vectors: LayerVectors) -> None:
        """Measure a layer, for all its numbers of groups and all choices of v."""
        x_TD, dY_TO = captured.x_TD.double(), captured.dY_TO.double()
        exact = measures.exact_gradient(dY_TO, x_TD)
        sample = Sample(step, layer.name, captured.tokens, len(x_TD), _short(exact.sparsity))
        self.samples.append(sample)
        for groups, size in layer.sizes:
            x_TGM = measures.grouped(x_TD, groups, size)
            ranks = measures.stable_ranks(x_TGM)
            found = [_short(ranks.shared), _short(ranks.per_group)]
            self.ranks.append(Rank(step, layer.name, groups, size, *found))
            pairs = similarity.draw_pairs(x_TGM, layer_seed(layer.name, self._seed, groups))
            for choice in self._choices:
                v_GM = vectors.vectors(choice, groups, size)
                z_TG = measures.project(x_TGM, v_GM)
                energy = measures.energy(x_TGM, z_TG)
                by_group = energy.by_group_G[energy.by_group_G.isfinite()].tolist()
                kept = measures.gradient_kept(exact, dY_TO, z_TG, v_GM)
                change = similarity.change(x_TGM, z_TG, pairs)
                self._changes[step, groups, choice].append(change)
                self.projections.append(
                    Projection(
                        step,
                        layer.name,
                        groups,
                        choice.init,
                        choice.vectors,
                        energy=_short(energy.kept),
                        energy_lowest=_short(min(by_group, default=math.nan)),
                        energy_highest=_short(max(by_group, default=math.nan)),
                        zeroed=_short(energy.zeroed),
                        cosine=_short(kept.cosine),
                        relative_error=_short(kept.relative_error),
                        sparsity=_short(kept.sparsity),
                        spread=_short(change.spread),
                        similarity_change=_short(change.mean),
                        prediction_gap=_short(change.gap),
                        stable_rank=_short(measures.stable_rank(z_TG)),
                    )
                )

    def curves(self) -> list[Curve]:
        """Figure 2b: means over layers."""
        return [
            Curve(
                step,
                groups,
                choice.init,
                choice.vectors,
                len(changes),
                pairs=_means([change.pairs_K for change in changes]),
                single=_means([change.single_K for change in changes]),
                predicted=_means([change.predicted_K for change in changes]),
            )
            for (step, groups, choice), changes in self._changes.items()
        ]


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are defined; NaN if none is."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _means(curves: Sequence[Sequence[float]]) -> list[float]:
    return [_short(mean(points)) for points in zip(*curves, strict=True)]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
