"""The `results.json` of a training run: its typed form, and reading and writing it.

Bytes are integers, times are seconds, accuracies lie between 0 and 1. A number that
is not finite (a loss that overflowed, say) is written as `null`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from velora_torch.atomic import write_whole

SCHEMA = "velora-torch/results/1"


@dataclass
class MachineInfo:
    """The machine that a run was measured on; it says nothing that identifies its owner."""

    cpu: str = "unknown"
    """Model of the CPU, as the system names it."""
    cores: int = 0
    """Cores that the process may use."""
    memory_bytes: int | None = None
    """Memory that the process may use."""
    device: str = "cpu"
    """What trained: "cpu", or the accelerator's name."""
    device_memory_bytes: int | None = None
    """The accelerator's memory; None on a CPU."""


@dataclass
class RunInfo:
    """What was run, when, on what, and how it ended."""

    name: str
    status: Literal["finished", "interrupted"]
    command: str = ""
    started: str = ""
    """Date and time of the start, ISO 8601."""
    seconds: float = math.nan
    """Wall-clock time of the whole run."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The recipe with every default filled in, as nested JSON values."""
    versions: dict[str, str] = field(default_factory=dict)
    machine: MachineInfo = field(default_factory=MachineInfo)


@dataclass
class ModelInfo:
    """The trained model, and which of its layers are compressed."""

    name: str
    parameters: int
    trainable_parameters: int
    compressed_layers: dict[str, str] = field(default_factory=dict)
    """Layer name -> how it is compressed (such as "576 features in 16 groups of 36"); may be ""."""
    exact_layers: dict[str, str] = field(default_factory=dict)
    """Layer name -> why it was left exact."""


@dataclass
class HistoryPoint:
    """One logged training step."""

    step: int
    loss: float | None
    learning_rate: float | None = None
    grad_norm: float | None = None
    seconds: float | None = None
    """Time since training began."""
    tokens_per_second: float | None = None
    peak_bytes: int | None = None


@dataclass
class Evaluation:
    """One evaluation during training."""

    step: int
    loss: float | None
    accuracy: float | None = None
    examples: int = 0
    seconds: float | None = None
    """Time since training began, evaluations included."""


@dataclass
class Quality:
    """What the model could do before or after training, on held-out examples."""

    accuracy: float | None = None
    loss: float | None = None
    examples: int = 0
    choices: list[str] = field(default_factory=list)
    """The answers that the model chooses from; chance is one over their number."""
    accuracy_by_choice: dict[str, float | None] = field(default_factory=dict)
    """Accuracy on the examples whose right answer is this choice."""
    metric: str = "accuracy"
    """The score that counts; "perplexity" after pre-training."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """All scores by name; None: not defined."""
    perplexity: float | None = None
    """Of a language model on general text, which shows what it forgets."""

    @property
    def score(self) -> float | None:
        """The score that counts; higher is better, but for a perplexity."""
        return self.scores.get(self.metric, self.accuracy)


@dataclass
class Memory:
    """Bytes that one training step holds, by category. None: not measured."""

    weights: int | None = None
    saved_activations: int | None = None
    gradients: int | None = None
    optimizer_state: int | None = None

    @property
    def total(self) -> int | None:
        """Sum of the four categories, or None if one of them was not measured."""
        parts = (self.weights, self.saved_activations, self.gradients, self.optimizer_state)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


@dataclass
class Prediction:
    """What a plan predicted for the largest batch, before the run: see the history's peaks."""

    budget_bytes: int
    peak_bytes: int
    """The largest moment of a step; on a CPU without the process's own memory."""
    peak: dict[str, int] = field(default_factory=dict)
    """That moment by category."""
    step_cost: float = math.nan
    """FLOPs of a step over those of a plain one."""
    setup: str = ""


@dataclass
class StepSeconds:
    """Seconds of a training step over several repeats."""

    median: float
    low: float
    high: float
    repeats: int


@dataclass
class ComparisonRow:
    """One variant of the same training step, measured next to the others."""

    variant: str
    """Such as "plain AdamW" or "VeLoRA". The first row is what the others are compared with."""
    seconds: StepSeconds | None = None
    saved_activation_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    weights_bytes: int | None = None
    loss: float | None = None

    @property
    def memory(self) -> Memory:
        """The same bytes as a `Memory`."""
        return Memory(
            weights=self.weights_bytes,
            saved_activations=self.saved_activation_bytes,
            gradients=self.gradient_bytes,
            optimizer_state=self.optimizer_bytes,
        )


@dataclass
class Results:
    """Everything in `results.json`."""

    run: RunInfo
    model: ModelInfo
    history: list[HistoryPoint] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    before: Quality | None = None
    after: Quality | None = None
    memory: Memory | None = None
    compare: list[ComparisonRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prediction: Prediction | None = None


def write_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Write `results` as JSON; a reader finds the old file or the whole new one."""
    document = {"schema": SCHEMA, **_encode(results, "results")}
    write_whole(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a file that `write_results` wrote; a ValueError says what is wrong with any other."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise ValueError(f"{path}: not a whole JSON file (truncated?): {error}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(f'{path}: not a results file of velora-torch (no "schema" in it)')
    schema = document.pop("schema")
    if schema != SCHEMA:
        raise ValueError(f"{path}: its schema is {schema!r}, and only {SCHEMA!r} can be read here")
    try:
        return typing.cast(Results, _decode(document, Results, ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _encode(value: Any, where: str) -> Any:
    """`value` as JSON values; numbers that are not finite become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: _encode(getattr(value, f.name), f"{where}.{f.name}") for f in fields}
    if isinstance(value, Mapping):
        return {str(key): _encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    raise TypeError(f"{where}: a {type(value).__name__} can't be written as JSON")


def _decode(value: Any, kind: Any, where: str) -> Any:
    """The JSON `value` as `kind`, a dataclass or one of the annotations used in this file."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(value, kind, where)
    if kind is Any:
        return value
    if origin is types.UnionType:  # always "X | None" here
        return None if value is None else _decode(value, arguments[0], where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {value!r} is none of {', '.join(map(repr, arguments))}")
        return value
    if origin is list and isinstance(value, list):
        return [_decode(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _decode(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if kind is float and value is None:  # it was not finite when it was written
        return math.nan
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    expected = getattr(origin or kind, "__name__", str(kind))
    raise ValueError(f"{where}: expected {expected}, found {_found(value)}")


def _decode_dataclass(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'}: expected an object, found {_found(value)}")
    hints = typing.get_type_hints(kind)
    dot = f"{where}." if where else ""
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{dot}{unknown[0]}: not a field of this schema")
    for f in dataclasses.fields(kind):
        optional = (
            f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        )
        if f.name not in value and not optional:
            raise ValueError(f"{dot}{f.name}: missing")
    return kind(**{k: _decode(v, hints[k], f"{dot}{k}") for k, v in value.items()})


def _found(value: Any) -> str:
    """What a JSON value is, for a message."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
