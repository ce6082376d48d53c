"""What a recipe may say: its top level, and which settings exclude each other.

The sections are in `sections.py`; files and overrides are read in `recipe.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from velora_torch.memory.planner.budget import parse_budget
from velora_torch.training import processes
from velora_torch.training.sections import (
    CompareSection,
    DataSection,
    EvaluateSection,
    HydraSection,
    LoraSection,
    Positive,
    QuantizationSection,
    Section,
    TokenizerSection,
    TrainSection,
    VeloraSection,
    fail,
    parse_count,
)

Task = Literal[
    "language-modeling",
    "pretrain",
    "text-classification",
    "text-regression",
    "image-classification",
]
Method = Literal[
    "full",
    "linear-probe",
    "bitfit",
    "lora",
    "rslora",
    "dora",
    "pissa",
    "olora",
    "adalora",
    "loha",
    "lokr",
    "ia3",
    "ssf",
    "hydra",
    "qlora",
    "coefficients",
]
PEFT_METHODS = (
    "lora",
    "rslora",
    "dora",
    "pissa",
    "olora",
    "adalora",
    "loha",
    "lokr",
    "ia3",
    "qlora",
)
"""Methods whose adapters PEFT makes."""
PRETRAINED = ("full", "lora", "rslora", "dora")
"""Methods that make sense from random weights."""
RESTARTED = ("lora", "rslora")
"""Methods whose adapters can be merged and begin anew with the same output."""
METRICS = {
    "language-modeling": ("auto", "choice", "loss"),
    "pretrain": ("auto", "loss"),
    "text-classification": ("auto", "loss", "accuracy", "f1", "matthews"),
    "text-regression": ("auto", "loss", "pearson", "spearman"),
    "image-classification": ("auto", "loss", "accuracy", "f1", "matthews"),
}


class Recipe(Section):
    """One training run, complete."""

    model: str = Field(default="smollm2-135m-instruct", min_length=1)
    """A packaged model's name, a hub id, or a local folder."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """How transformers computes attention; null: its own choice. eager is fastest for short
    sequences on a CPU, and keeps the attention weights."""
    task: Task = "language-modeling"
    """What the model learns to do; pretrain begins with random weights."""
    tokenizer: TokenizerSection | None = None
    """The vocabulary, for the task pretrain."""
    method: Method = "full"
    """What is trained: all weights, the head, biases, adapters, or coefficients alone."""
    head: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the layers that a task adds and that always train; null: found."""
    memory_budget: str | Positive | None = None
    """Such as 24GiB: settings that save memory and are not given are chosen so that it fits."""
    velora: VeloraSection | None = Field(default_factory=VeloraSection)
    """Compression; null trains without. Not given: the settings recommended for PEFT's adapters,
    nothing with linear-probe, the paper's with the other methods."""
    lora: LoraSection | None = None
    """PEFT's adapters, for the methods that have them."""
    hydra: HydraSection | None = None
    """Branches, for the method hydra."""
    quantization: QuantizationSection | None = None
    """The quantised base, for the methods qlora and coefficients."""
    data: DataSection
    """What is learnt from."""
    train: TrainSection = Field(default_factory=TrainSection)
    """The optimisation."""
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    """Evaluation before and after."""
    compare: CompareSection | None = None
    """Plain and VeLoRA steps side by side at the end; null: not measured."""

    @field_validator("memory_budget")
    @classmethod
    def _is_size(cls, budget: str | int | None) -> str | int | None:
        if budget is not None:
            parse_budget(budget)
        return budget

    @model_validator(mode="after")
    def _budget_can_be_planned(self) -> Self:
        if self.memory_budget is None:
            return self
        if self.method not in ("full", "lora", "qlora"):
            fail("memory_budget", f"cannot be planned for method: {self.method}")
        if self.train.autocast:
            fail("memory_budget", "cannot be planned with train.autocast, which is not simulated")
        if self.compare is not None and "velora" not in self.model_fields_set:
            fail("memory_budget", "may choose to train without velora, which compare needs; set it")
        return self

    @model_validator(mode="after")
    def _method_and_sections(self) -> Self:
        method = self.method
        if self.lora is not None and method not in PEFT_METHODS:
            instead = "set method: lora, or remove the section"
            fail("lora", f"has no effect with method: {method}; {instead}")
        if self.hydra is not None and method != "hydra":
            fail("hydra", f"has no effect with method: {method}; set method: hydra")
        if self.quantization is not None and method not in ("qlora", "coefficients"):
            fail("quantization", f"has no effect with method: {method}; set method: qlora")
        if method in PEFT_METHODS and self.lora is None:
            self.lora = LoraSection()
        if method == "hydra" and self.hydra is None:
            self.hydra = HydraSection()
        if method == "qlora" and self.quantization is None:
            self.quantization = QuantizationSection()
        return self

    @model_validator(mode="after")
    def _velora_of_the_method(self) -> Self:
        """What `compress(model)` takes, where nothing is said; a budget chooses by itself."""
        if "velora" in self.model_fields_set or self.memory_budget is not None:
            return self
        if self.method == "linear-probe":
            self.velora = None  # nothing to compress
        elif self.method in PEFT_METHODS:
            self.velora = VeloraSection(recommended="lora")
        return self

    @model_validator(mode="after")
    def _coefficients_alone(self) -> Self:
        if self.method != "coefficients":
            return self
        if self.velora is None:
            fail("velora", "holds the coefficients that method: coefficients trains; set it")
        given = self.velora.model_fields_set
        if "fold_every" in given and self.velora.fold_every is not None:
            fail("velora.fold_every", "must be null with method: coefficients: the base stays")
        if "train_frozen" in given and not self.velora.train_frozen:
            fail(
                "velora.train_frozen", "must be true with method: coefficients: the base is frozen"
            )
        self.velora.fold_every, self.velora.train_frozen = None, True
        return self

    @model_validator(mode="after")
    def _pretraining(self) -> Self:
        if self.task != "pretrain":
            if self.tokenizer is not None:
                fail("tokenizer", f"is for task: pretrain; task: {self.task} has the model's own")
            if self.train.tokens is not None:
                fail("train.tokens", "is for task: pretrain; set train.epochs or train.steps")
            if self.data.shuffle is not None:
                fail("data.shuffle", "is for task: pretrain; train.seed shuffles other examples")
            return self
        if self.tokenizer is None:
            self.tokenizer = TokenizerSection()
        if self.data.shuffle is None:
            self.data.shuffle = True
        if self.method not in PRETRAINED:
            fail("method", f"has no sense with task: pretrain; known: {', '.join(PRETRAINED)}")
        if self.memory_budget is not None:
            fail("memory_budget", "cannot be planned for task: pretrain; use `velora plan`")
        for name, value in (
            ("data.packing", self.data.packing),
            ("train.group_by_length", self.train.group_by_length),
            ("train.longest_first", self.train.longest_first),
        ):
            if value:
                fail(name, "has no effect with task: pretrain: all windows are full")
        if self.data.format not in (None, "text"):
            fail("data.format", f"must be text with task: pretrain, not {self.data.format}")
        if self.evaluate.perplexity is not None:
            fail(
                "evaluate.perplexity", "is not for task: pretrain, which is scored by that of data"
            )
        if self.train.tokens is not None and (self.token_budget() or 0) < self.step_tokens():
            step = self.step_tokens()
            fail("train.tokens", f"is less than one step takes, which is {step:,} tokens")
        return self

    @model_validator(mode="after")
    def _restarts(self) -> Self:
        lora, key = self.lora, "lora.restart_every"
        if lora is None:
            return self
        if lora.restart_every is None:
            if lora.restart_warmup is not None:
                fail("lora.restart_warmup", f"has no effect without {key}")
            return self
        if self.task != "pretrain":
            fail(
                key,
                "is for task: pretrain: restarts change the weights under the adapters, and "
                "elsewhere a run leaves adapters alone",
            )
        if self.method not in RESTARTED:
            fail(key, f"is for method: {' or '.join(RESTARTED)}, not {self.method}")
        if (lora.restart_warmup or 0) >= lora.restart_every:
            fail("lora.restart_warmup", f"must be less than {key}, which is {lora.restart_every}")
        steps = self.steps()
        if steps is not None and lora.restart_every >= steps:
            fail(key, f"must be less than the steps of the run, which are {steps:,}")
        return self

    @model_validator(mode="after")
    def _task_and_settings(self) -> Self:
        if self.evaluate.metric not in METRICS[self.task]:
            known = ", ".join(METRICS[self.task])
            fail("evaluate.metric", f"is not a metric of task: {self.task}; known: {known}")
        if self.is_language_model:
            if self.train.head_learning_rate is not None:
                fail("train.head_learning_rate", "is for tasks with a head, not language modeling")
            return self
        if self.memory_budget is not None:
            fail("memory_budget", f"cannot be planned for task: {self.task}; use `velora plan`")
        if self.data.packing:
            fail("data.packing", f"has no meaning with task: {self.task}")
        if self.train.chunked_loss:
            fail("train.chunked_loss", f"is for language models, not for task: {self.task}")
        if self.evaluate.perplexity is not None:
            fail("evaluate.perplexity", f"is for language models, not for task: {self.task}")
        if self.task == "image-classification" and self.train.group_by_length:
            fail("train.group_by_length", "has no meaning for images")
        if self.task == "image-classification" and self.compare and self.compare.length:
            fail("compare.length", "has no meaning for images")
        return self

    @model_validator(mode="after")
    def _coefficients_and_their_rate(self) -> Self:
        key = "train.coefficient_learning_rate"
        if self.train.coefficient_learning_rate is None:
            return self
        if self.velora is None:
            fail(key, "has no effect without velora, which is null")
        if self.velora.gradient == "dense":
            fail(key, "has no effect with velora.gradient: dense, which has no coefficients")
        return self

    @model_validator(mode="after")
    def _rates_of_layers(self) -> Self:
        for pattern in self.train.learning_rates:
            try:
                re.compile(pattern)
            except re.error as error:
                fail("train.learning_rates", f"{pattern!r} is no regular expression: {error}")
        return self

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.compare is not None and self.velora is None:
            fail("compare", "compares plain steps with VeLoRA steps, but velora is null")
        if self.data.packing and self.train.group_by_length:
            fail("train.group_by_length", "has no effect with data.packing: all lengths are equal")
        if self.data.format == "text" and self.evaluate.metric == "choice":
            fail("evaluate.metric", "'choice' needs instruction data, and data.format is 'text'")
        return self

    @property
    def is_language_model(self) -> bool:
        """Whether the model predicts tokens, and has no head for a task."""
        return self.task in ("language-modeling", "pretrain")

    def step_tokens(self) -> int:
        """Tokens of an optimizer step of task: pretrain, over all processes."""
        train = self.train
        return train.batch_size * train.accumulation * self.data.max_length * processes.shares()

    def steps(self) -> int | None:
        """Optimizer steps that the recipe asks for; None where it counts epochs."""
        tokens = self.train.tokens
        if tokens is None:
            return self.train.steps
        asked = parse_count(tokens) if isinstance(tokens, str) else tokens
        return asked // self.step_tokens()

    def token_budget(self) -> int | None:
        """Tokens that task: pretrain takes in all, in whole steps; None where it counts epochs."""
        steps = self.steps()
        return None if steps is None else steps * self.step_tokens()

    def describe(self) -> str:
        """Summarise the run in a few lines of plain text."""
        from velora_torch.training.describe import describe

        return describe(self)
