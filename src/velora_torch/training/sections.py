"""The sections of a recipe, their fields and defaults.

The docstring under a field is its documentation; error messages quote its first sentence.
"""

from __future__ import annotations

import difflib
import re
import string
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from velora_torch.config import Init, Purpose, recommended_settings

LARGEST = 2**63 - 1
"""The largest whole number of a recipe: what PyTorch's counters and seeds hold."""
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Targets = str | Annotated[list[str], Field(min_length=1)]

TEMPLATES = ("alpaca", "chat", "plain")
PLACEHOLDERS = ("instruction", "input", "system")


def fail(key: str, reason: str) -> NoReturn:
    """Refuse a combination of settings, naming the dotted key that is at fault."""
    raise PydanticCustomError("recipe", "{reason}", {"key": key, "reason": reason})


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and a text is not taken for a number."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def parse_count(text: str) -> int:
    """The number that a text such as "100M" or "2.5B" says.

    Raises:
        ValueError: it says none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbB]?)\s*", text)
    if match is None or not 0 < float(match[1]) <= LARGEST:
        raise ValueError("is not a number of tokens such as 100M, 2.5B or 500000")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])


class VeloraSection(Section):
    """What is compressed, and how: the fields of `velora_torch.VeloraConfig`."""

    recommended: Purpose | None = None
    """Settings that measured best for a purpose, in place of defaults; other keys change them."""
    targets: Targets = "all-linear"
    """"all-linear", a list of layer names, or a regular expression over full names."""
    num_groups: Positive | dict[str, Positive] | None = None
    """Groups per layer input: one number, or one per layer name; 32 if sub_token_size is unset."""
    sub_token_size: Positive | dict[str, Positive] | None = None
    """Width of a group, instead of num_groups: one number, or one per layer name."""
    init: Init = "average"
    """How the projection vector is chosen."""
    vectors: Literal["shared", "per_group"] = "shared"
    """One vector per layer, or one per group of a layer."""
    refresh_every: Positive | None = None
    """Optimizer steps between new vectors; null keeps them for the whole run."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the compressed weight gradient."""
    gradient: Literal["factored", "dense"] = "factored"
    """"factored" trains on the small factor; "dense" fills weight.grad as the paper does."""
    seed: Natural = 0
    """Seed of random vectors."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How an update is rounded when it is folded into low-precision weights."""
    fold_every: Positive | None = 1
    """Optimizer steps between folds into the weights; null never folds while training."""
    running_decay: float = Field(default=0.9, ge=0, lt=1)
    """Weight of the past in the running average."""
    track_delta: bool = True
    """Keep the sum of all folded coefficients, which exporting a LoRA adapter needs."""
    train_frozen: bool = False
    """Give coefficients to frozen and quantised layers too, which needs fold_every: null."""

    @field_validator("targets")
    @classmethod
    def _is_regular_expression(cls, targets: str | list[str]) -> str | list[str]:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from None
        return targets

    @model_validator(mode="after")
    def _recommended(self) -> Self:
        if self.recommended is not None:
            given = self.model_dump(include=self.model_fields_set)
            for name, value in recommended_settings(self.recommended, given).items():
                setattr(self, name, value)
        return self

    @model_validator(mode="after")
    def _one_way_to_group(self) -> Self:
        if self.num_groups is not None and self.sub_token_size is not None:
            fail("velora.sub_token_size", "set num_groups or sub_token_size, not both")
        return self

    def to_kwargs(self) -> dict[str, Any]:
        """Return the settings that were given, as keyword arguments for `VeloraConfig`."""
        given = self.model_dump(include=self.model_fields_set, exclude={"recommended"})
        unset = ("num_groups", "sub_token_size")  # null means "not given" for these two
        return {k: v for k, v in given.items() if not (k in unset and v is None)}


class LoraSection(Section):
    """PEFT's adapters: LoRA and its variants, AdaLoRA, LoHa, LoKr and IA3."""

    r: Positive = 16
    """Rank of the adapters."""
    alpha: float = Field(default=32, gt=0)
    """Numerator of the adapters' scale alpha / r."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapters' input."""
    targets: Targets = "all-linear"
    """"all-linear", a list of layer names, or a regular expression over full names."""
    restart_every: Positive | None = None
    """Steps after which adapters are merged into the weights and begin anew (ReLoRA; methods lora
    and rslora of the task pretrain); null: never."""
    restart_warmup: Natural | None = None
    """Steps in which the learning rate comes back after that; null: a tenth of restart_every."""


class HydraSection(Section):
    """Hydra's parallel and sequential low-rank branches."""

    r: Positive = 4
    """Rank of a branch."""
    alpha: float = Field(default=4, gt=0)
    """Numerator of the branches' scale alpha / r."""
    targets: Targets = "all-linear"
    """"all-linear", a list of layer names, or a regular expression over full names."""


class QuantizationSection(Section):
    """A frozen quantised base, by bitsandbytes."""

    type: Literal["nf4", "fp4", "int8"] = "nf4"
    """Data type of the weights."""
    double: bool = True
    """Quantise the quantisation constants too (4-bit types)."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the multiplications."""


class TokenizerSection(Section):
    """The tokenizer of a pre-training run: trained on its text, or a given one."""

    vocab_size: int | None = Field(default=None, ge=320, le=262144)
    """Tokens of the byte-level BPE that is trained; 8192 where no source is given."""
    source: str | None = Field(default=None, min_length=1)
    """A model whose tokenizer is taken instead: a packaged one, a folder, or a hub id."""

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        if self.source is not None and self.vocab_size is not None:
            fail("tokenizer.vocab_size", "has no effect with tokenizer.source; give one of them")
        if self.source is None and self.vocab_size is None:
            self.vocab_size = 8192
        return self


class ColumnsSection(Section):
    """The data's own names for what the templates need; null: guessed from common names."""

    instruction: str | None = None
    """Column with the task or the question."""
    input: str | None = None
    """Column with what the instruction applies to; may be absent."""
    output: str | None = None
    """Column with the answer to learn."""
    text: str | None = None
    """Column with plain text."""
    messages: str | None = None
    """Column with a list of {role, content} messages."""
    text_pair: str | None = None
    """Column with the second text of a pair to classify; may be absent."""
    image: str | None = None
    """Column with the image to classify."""
    label: str | None = None
    """Column with the class, or with the number of a regression."""


class DataSection(Section):
    """What is learnt from, and how it becomes tokens."""

    train: str = Field(min_length=1)
    """A packaged data set, a file (.jsonl .json .csv .txt .parquet), or a hub data set."""
    eval: str | None = Field(default=None, min_length=1)
    """Held-out data, as for train; null splits it off train."""
    eval_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of train that is held out when eval is null; packaged data bring their own split,
    unless eval_split is "train"."""
    subset: str | None = None
    """Configuration name of a hub data set that has several."""
    train_split: str = "train"
    """Split of a hub data set to train on."""
    eval_split: str | None = None
    """Split of a hub data set to evaluate on. Packaged data: "test", as null, or "train": hold out
    examples of the training split, so that settings are chosen without a look at the test split."""
    format: Literal["instruction", "chat", "text"] | None = None
    """Kind of data; null takes it from the columns."""
    columns: ColumnsSection = Field(default_factory=ColumnsSection)
    """Column names."""
    template: str = Field(default="alpaca", min_length=1)
    """"alpaca", "chat" (the tokenizer's), "plain", or a text with {instruction} and {input}."""
    system: str | None = None
    """System message for the chat template, or {system} of a template of your own."""
    max_length: int = Field(default=512, ge=8)
    """Longest sequence, in tokens."""
    too_long: Literal["error", "truncate", "skip"] = "error"
    """What to do with an example longer than max_length."""
    packing: bool = False
    """Fill sequences of max_length with several examples, which don't see each other."""
    answers_only: bool = True
    """Learn the answers, not the prompts."""
    image_size: Positive | None = None
    """Height and width of images, in pixels; null: the model's."""
    max_train: Positive | None = None
    """Use at most so many training examples."""
    max_eval: Positive | None = None
    """Use at most so many held-out examples."""
    shuffle: bool | None = None
    """Take the documents out of the order of their source (task: pretrain); null: true there."""
    seed: Natural = 0
    """Seed of the split and of the choice when max_train or max_eval leaves some out; with shuffle
    of the order of documents too."""

    @field_validator("template")
    @classmethod
    def _is_template(cls, template: str) -> str:
        if template in TEMPLATES:
            return template
        try:
            parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"has a stray brace ({error}); write {{{{ for a literal one") from None
        names = [str(name) for _, name, _, _ in parts]
        for _, name, form, conversion in parts:
            if form or conversion:
                raise ValueError(f"gives {{{name}}} a format of its own; write {{{name}}} alone")
            if name not in PLACEHOLDERS:
                raise ValueError(
                    f"has an unknown placeholder {{{name}}}; "
                    "known: {instruction}, {input}, {system}"
                )
        if not {"instruction", "input"} & set(names):
            near = difflib.get_close_matches(template, TEMPLATES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"is none of {', '.join(TEMPLATES)}, "
                f"and contains no {{instruction}} or {{input}}{hint}"
            )
        return template

    @model_validator(mode="after")
    def _one_eval(self) -> Self:
        default = type(self).model_fields["eval_fraction"].default
        if self.eval is not None and self.eval_fraction != default:
            fail("data.eval_fraction", "splits train, but data.eval names held-out data already")
        return self


class TrainSection(Section):
    """The optimisation, and what is written while it runs."""

    output: str = Field(default="runs/default", min_length=1)
    """Folder for checkpoints and results; by default runs/ and the recipe's name."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data; 1 when steps is not given either."""
    steps: Positive | None = None
    """Optimizer steps, instead of epochs."""
    tokens: str | Positive | None = None
    """Tokens to learn from, such as 100M, instead of epochs (task: pretrain)."""
    batch_size: Positive = 8
    """Sequences in one forward pass."""
    accumulation: Positive = 1
    """Forward passes per optimizer step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Highest learning rate of the schedule."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """That of the head which a task adds, new and random; null: the same."""
    coefficient_learning_rate: float | None = Field(default=None, gt=0)
    """That of VeLoRA's coefficients (factored gradients); null: the same."""
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Rates of some layers: regular expressions over full names, each with the rate of all that
    trains in such a layer. Of two that match, the later counts; the head's and the coefficients'
    own rates, where they are set, count before any."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup: Natural | Annotated[float, Field(ge=0, lt=1)] = 0
    """Steps of rising learning rate (a whole number), or their share of all steps (below 1)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    optimizer: str = "adamw_torch_fused"
    """One of transformers' optimizer names, or flora."""
    optimizer_targets: Targets | None = None
    """Layers that a low-rank optimizer (galore_adamw, apollo_adamw, flora) projects; null: all
    linear. Coefficients (VeLoRA's factored gradients) are not projected: AdamW trains them."""
    optimizer_settings: dict[str, int | float | str] = Field(default_factory=dict)
    """Settings of the optimizer by name, such as rank and update_proj_gap."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2
    )
    """Adam's decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 leaves them."""
    seed: Natural = 0
    """Seed of the order of examples, dropout and new weights."""
    gradient_checkpointing: bool | Positive = False
    """Compute activations twice instead of saving them; a number n: those of 1 block in n."""
    recompute: bool = False
    """Norms and activation functions save only their input, and are computed again."""
    chunked_loss: bool = False
    """Compute the loss in chunks, so that the logits never exist as a whole."""
    autocast: bool = False
    """Mixed precision: compute in bfloat16 (float16 with float16 weights) under autocast."""
    log_every: Positive = 10
    """Steps between log lines."""
    eval_every: Positive | None = None
    """Steps between evaluations of the loss; null: only before and after."""
    save_every: Positive | None = None
    """Steps between checkpoints; null: none but the trained model at the end."""
    keep: Positive = 2
    """Checkpoints to keep."""
    shard_checkpoints: bool = False
    """With --strategy fsdp2: each process writes its shard, instead of one all of them."""
    save_final: bool = True
    """Write the trained model at the end."""
    tensorboard: bool = True
    """Write TensorBoard logs."""
    group_by_length: bool = False
    """Put examples of similar length into one batch: less padding."""
    longest_first: bool = False
    """Begin with the longest example: if a batch is too large for the memory, the first one is."""
    on_nonfinite: Literal["stop", "skip"] | None = None
    """What a loss or gradient that is NaN or infinite does: stop (null), or leave out the step."""
    max_skipped: Positive | None = None
    """Steps that on_nonfinite: skip leaves out in a run; null: 10. One more stops it."""
    on_oom: Literal["stop", "shrink"] | None = None
    """What running out of memory does: stop (null), or take the step again, and all later ones, in
    smaller micro-batches that add up to the same."""

    @field_validator("tokens")
    @classmethod
    def _is_count(cls, tokens: str | int | None) -> str | int | None:
        if isinstance(tokens, str):
            parse_count(tokens)
        return tokens

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        given = [n for n in ("epochs", "steps", "tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            fail(f"train.{given[1]}", f"set train.{given[0]} or train.{given[1]}, not both")
        if not given:
            self.epochs = 1.0
        return self


class EvaluateSection(Section):
    """What is measured on held-out data around the training."""

    before: bool = True
    """Evaluate the untrained model."""
    after: bool = True
    """Evaluate the trained model."""
    max_examples: Positive | None = None
    """Held-out examples to evaluate; null: all."""
    metric: Literal[
        "auto", "choice", "loss", "accuracy", "f1", "matthews", "pearson", "spearman"
    ] = "auto"
    """"choice": accuracy of the likeliest of the answers that occur; "loss"; for classification
    accuracy, f1 or matthews; for regression pearson or spearman; "auto" decides."""
    perplexity: str | None = Field(default=None, min_length=1)
    """General text (packaged, or a file) whose perplexity shows what a language model forgets."""
    batch_size: Positive = 16
    """Sequences in one forward pass of an evaluation."""


class CompareSection(Section):
    """A side-by-side measurement after the run: plain steps and VeLoRA steps, interleaved."""

    repeats: Positive = 5
    """Steps of each kind that are timed."""
    batch_size: Positive | None = None
    """Sequences in a timed step; null: train.batch_size."""
    length: Positive | None = None
    """Tokens of each sequence; null: as the training data."""
