"""The `results.json` of a training run: its typed form, and reading and writing it.

Bytes are integers, times are seconds, accuracies lie between 0 and 1. A number that
is not finite (a loss that overflowed, say) is written as `null`.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from velora_torch.atomic import write_whole
from velora_torch.report.codec import encode, read_document

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
    instructions: str = ""
    """The CPU's widest vectors that PyTorch uses, such as "AVX2" or "AVX512"; "": not known."""
    device: str = "cpu"
    """What trained: "cpu", or the accelerator's name."""
    device_memory_bytes: int | None = None
    """The accelerator's memory; None on a CPU."""
    half_products: str = "native"
    """How the CPU multiplied half-precision matrices: "native", or "float32" (half_products.py)."""


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
    data: dict[str, Any] = field(default_factory=dict)
    """What the recipe's data came to: examples, tokens; of pre-training digests of the text."""
    versions: dict[str, str] = field(default_factory=dict)
    machine: MachineInfo = field(default_factory=MachineInfo)
    signal: int | None = None
    """The signal that interrupted it, such as 15; None: none did."""


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
    document = {"schema": SCHEMA, **encode(results, "results")}
    write_whole(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a file that `write_results` wrote; a ValueError says what is wrong with any other."""
    return read_document(path, SCHEMA, Results, "a results file")
