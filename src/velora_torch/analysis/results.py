"""The `analysis.json` of `velora analyze`: its typed form, and reading and writing it.

What each number means is said by the functions that compute it, in `measures.py` and
`similarity.py`. A number that is not defined is written as `null`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from velora_torch.atomic import write_whole
from velora_torch.report.codec import encode, read_document
from velora_torch.report.results import RunInfo

SCHEMA = "velora-torch/analysis/1"


@dataclass
class LayerInfo:
    """A layer that was looked at."""

    name: str
    kind: str
    """What it is called in its block, such as ``v_proj``."""
    features: int
    """D."""
    outputs: int
    """O."""


@dataclass
class Sample:
    """What was taken of a layer in a step, and its exact gradient on that."""

    step: int
    """Optimizer steps before it."""
    layer: str
    tokens: int
    """Tokens that the layer saw in this step, padding included."""
    sampled: int
    """Tokens that everything was computed from."""
    sparsity: float
    """Share of the exact weight gradient's entries that nearly vanish. NaN: all are zero."""


@dataclass
class Rank:
    """Stable rank of a layer's input, cut into sub-tokens (figure 2a)."""

    step: int
    layer: str
    groups: int
    size: int
    """M, features of a sub-token."""
    shared: float
    """Of all sub-tokens together."""
    per_group: float
    """Mean over groups of that of the group's own."""


@dataclass
class Projection:
    """What one choice of v keeps of a layer's input and of its weight gradient."""

    step: int
    layer: str
    groups: int
    init: str
    vectors: str
    energy: float
    """Share of the input's squared length."""
    energy_lowest: float
    """The same for the group that keeps least."""
    energy_highest: float
    zeroed: float
    """Share of the sub-tokens of which almost nothing is kept."""
    cosine: float
    """Between the exact and the compressed weight gradient."""
    relative_error: float
    """Length of what the gradient loses, over its length."""
    sparsity: float
    """Share of the compressed gradient's entries that nearly vanish."""
    spread: float
    """σ, root mean square angle between sub-tokens and v, in radians."""
    similarity_change: float
    """Mean change of the similarity of two sub-tokens."""
    prediction_gap: float
    """Largest distance between the measured and the predicted curve of figure 2b."""
    stable_rank: float = math.nan
    """Of z, the matrix of what is kept, T x G: how many directions of the input it tells apart."""


@dataclass
class Curve:
    """Figure 2b for one choice of v: mean of all layers' curves, at the file's `thresholds`."""

    step: int
    groups: int
    init: str
    vectors: str
    layers: int
    """Layers in the mean."""
    pairs: list[float]
    """Share of the pairs of sub-tokens whose similarity changes by at least the threshold."""
    single: list[float]
    """The same for a sub-token with itself."""
    predicted: list[float]
    """2 (1 - Φ(√k / σ)) with each layer's σ."""


@dataclass
class Analysis:
    """Everything in `analysis.json`."""

    run: RunInfo
    steps: list[int]
    groups: list[int]
    tokens: int
    """The most that were sampled from a layer in a step."""
    thresholds: list[float]
    """Changes k of a similarity at which the curves were evaluated."""
    layers: list[LayerInfo] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """What was left out -> why."""
    samples: list[Sample] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    projections: list[Projection] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    @property
    def kind_of(self) -> dict[str, str]:
        """Layer name -> kind."""
        return {layer.name: layer.kind for layer in self.layers}

    @property
    def kinds(self) -> list[str]:
        """All kinds, in the order of the model."""
        return list(dict.fromkeys(layer.kind for layer in self.layers))


def choices_of(rows: Iterable[Projection] | Iterable[Curve]) -> list[tuple[str, str]]:
    """(init, vectors) of every choice of v among some rows, in their order."""
    return list(dict.fromkeys((row.init, row.vectors) for row in rows))


def write_analysis(analysis: Analysis, path: str | os.PathLike[str]) -> None:
    """Write `analysis` as JSON; a reader finds the old file or the whole new one."""
    document = {"schema": SCHEMA, **encode(analysis, "analysis")}
    # One line for each row: a whole model has tens of thousands.
    parts = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n    ".join(_json(row) for row in value)
            parts.append(f"  {_json(key)}: [\n    {rows}\n  ]")
        else:
            parts.append(f"  {_json(key)}: {_json(value)}")
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read_analysis(path: str | os.PathLike[str]) -> Analysis:
    """Read a file that `write_analysis` wrote.

    Raises:
        ValueError: it is another file; the message says what is wrong with it.
    """
    return read_document(path, SCHEMA, Analysis, "an analysis")
