"""The Hugging Face trainer of a run: its arguments, and what it records while it works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from velora_torch.integrations.bitsandbytes import take_overrides
from velora_torch.integrations.sharded_trainer import ShardedTrainerMixin, widen_biases
from velora_torch.integrations.tensor_parallel_trainer import TensorParallelTrainerMixin
from velora_torch.integrations.transformers import VeloraTrainerMixin
from velora_torch.integrations.zero_trainer import ZeroTrainerMixin
from velora_torch.memory.count import (
    optimizer_state_bytes,
    saved_bytes,
    unique_bytes,
    weight_tensors,
)
from velora_torch.model import coefficients
from velora_torch.report.quantities import format_bytes, format_seconds
from velora_torch.report.results import Evaluation, HistoryPoint, Memory
from velora_torch.state_types import keep_types
from velora_torch.training.data import PreparedData
from velora_torch.training.interrupts import StopWhenAsked
from velora_torch.training.methods import head_of
from velora_torch.training.models import parameters_in
from velora_torch.training.order import LongestFirst
from velora_torch.training.own_optimizers import OWN_OPTIMIZERS, give_settings, own_optimizer
from velora_torch.training.pretraining.tokens import TokenWindows
from velora_torch.training.restarts import RestartAdapters, Restarts, RestartsMixin
from velora_torch.training.safe_steps import SafeSteps
from velora_torch.training.schema import Recipe
from velora_torch.training.sections import TrainSection
from velora_torch.training.strategies import (
    Strategy,
    shard_on_cpus,
    sharding,
    shards_of,
    zero_stage,
)
from velora_torch.training.whole_checkpoints import WholeCheckpoints


@dataclass
class Record:
    """What a run has seen so far."""

    history: list[HistoryPoint] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    tokens: torch.Tensor | int = 0
    signal: int | None = None
    """The signal that interrupted it."""


class RecordingMixin(
    RestartsMixin, ZeroTrainerMixin, TensorParallelTrainerMixin, VeloraTrainerMixin
):
    """Counts tokens, and in the first step the bytes that it holds."""

    record: Record
    optimizer: Any
    longest_first: bool = False
    policy: TrainSection | None
    own_optimizer: TrainSection | None = None
    """Names an optimizer that transformers does not know."""
    head_rate: float | None = None
    """Learning rate of the layers named in `head`, where it differs."""
    head: tuple[str, ...] = ()
    coefficient_rate: float | None = None
    """Learning rate of the compressed layers' coefficients, where it differs."""
    layer_rates: Mapping[str, float] = MappingProxyType({})
    """Learning rates of layers, by a regular expression over their full names."""

    def create_accelerator_and_postprocess(self) -> None:
        """The trainer's own; also shards where accelerate would not, on CPUs."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.args.fsdp and shard_on_cpus(self.accelerator, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, with parameter groups for what has a rate of its own."""
        if self.own_optimizer is not None and self.optimizer is None:
            decayed = self.get_decay_parameter_names(self.model)
            self.optimizer = own_optimizer(self.model, self.own_optimizer, decayed)
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_load_state_dict_pre_hook(_with_own_kernels)
        if "Adafactor" in type(optimizer).__name__:
            # Not others: AdamW steps in the parameters' type, and ZeRO's checkpoints have float32.
            keep_types(optimizer)
        take_overrides(optimizer, self.model)
        if self.policy is not None and self.policy.optimizer.startswith(("galore", "apollo")):
            decayed = self.get_decay_parameter_names(self.model)
            give_settings(optimizer, self.model, self.policy, decayed)
        for pattern, rate in self.layer_rates.items():
            _give_own_rate(optimizer, parameters_in(self.model, pattern), rate)
        if self.head_rate is not None:
            # PEFT puts a prefix before the names.
            names = [n for n, _ in self.model.named_modules() if n.endswith(self.head)]
            parts = (p for name in names for p in self.model.get_submodule(name).parameters())
            _give_own_rate(optimizer, parts, self.head_rate)
        if self.coefficient_rate is not None:
            _give_own_rate(optimizer, coefficients(self.model), self.coefficient_rate)
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        if isinstance(dataset, TokenWindows):
            return SequentialSampler(dataset)  # they are in order already
        if not self.longest_first:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        return LongestFirst.of(dataset, self.args)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        """One forward and backward pass."""
        record = self.record
        record.tokens += _amount(inputs)
        if record.memory.saved_activations is not None:
            return super().training_step(model, inputs, *rest)
        with saved_bytes(self.model) as count:
            loss = super().training_step(model, inputs, *rest)
        record.memory.saved_activations = count()
        record.memory.gradients = unique_bytes(self.held_gradients())
        record.memory.weights = unique_bytes(weight_tensors(model))
        return loss


def _with_own_kernels(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state, to be stepped the way this optimizer does it: parameters that only some
    processes split can't be stepped at once, and a scaler of losses asks how it was made."""
    if len(state["param_groups"]) != len(optimizer.param_groups):
        return state  # torch says so
    groups = [
        {**saved, **{key: own[key] for key in ("foreach", "fused") if key in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def _give_own_rate(optimizer: Any, parameters: Iterable[torch.Tensor], rate: float) -> None:
    """Move parameters to groups of their own."""
    own = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        parts = [p for p in group["params"] if id(p) in own]
        if not parts:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.param_groups.append({**group, "params": parts, "lr": rate})
    # A group that is empty now would only confuse who looks at them.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _amount(inputs: dict[str, Any]) -> torch.Tensor | int:
    """Tokens of a batch, padding left out, or its images."""
    if "pixel_values" in inputs:
        return len(inputs["pixel_values"])
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else mask.sum()


class RecordingTrainerMixin(SafeSteps, WholeCheckpoints, ShardedTrainerMixin, RecordingMixin):
    """What a run's trainer is besides `Trainer` or a class of its kind."""


class RecordingTrainer(RecordingTrainerMixin, Trainer):
    """The trainer of tokenised data."""


class RecordCallback(TrainerCallback):
    """Writes log lines into the record and shows progress."""

    def __init__(self, record: Record, say: Callable[[str], None], unit: str = "tokens") -> None:
        self._record, self._say, self._unit = record, say, unit
        self._start = self._last = time.perf_counter()
        self._tokens_before, self._first_step = 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start the clock."""
        self._start = self._last = time.perf_counter()
        self._first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Count the optimizer's bytes once."""
        optimizer = rest.get("optimizer")
        if self._record.memory.optimizer_state is None and optimizer is not None:
            plain = getattr(optimizer, "optimizer", optimizer)
            self._record.memory.optimizer_state = optimizer_state_bytes(plain)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """AdaLoRA moves ranks between layers after every step, while the gradients are there."""
        base = getattr(rest["model"], "base_model", None)
        allocate = getattr(base, "update_and_allocate", None)
        if allocate is not None:
            allocate(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **rest: Any
    ) -> None:
        """Record a line of the loss curve, or of an evaluation."""
        if "eval_loss" in logs:
            taken = time.perf_counter() - self._start
            self._record.evaluations.append(
                Evaluation(state.global_step, logs["eval_loss"], seconds=taken)
            )
            self._say(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        now = time.perf_counter()
        tokens = int(self._record.tokens)
        rate = (tokens - self._tokens_before) / (now - self._last)
        point = HistoryPoint(
            step=state.global_step,
            loss=float(logs["loss"]),
            learning_rate=logs.get("learning_rate"),
            grad_norm=float(logs["grad_norm"]) if "grad_norm" in logs else None,
            seconds=now - self._start,
            tokens_per_second=rate,
            peak_bytes=peak_bytes(),
        )
        self._last, self._tokens_before = now, tokens
        self._record.history.append(point)
        done = state.global_step - self._first_step
        left = (now - self._start) / done * (state.max_steps - state.global_step)
        self._say(
            f"step {state.global_step}/{state.max_steps}  loss {point.loss:.4f}  "
            f"lr {point.learning_rate:.2e}  {rate:,.0f} {self._unit}/s  "
            f"memory {format_bytes(point.peak_bytes)}  left {format_seconds(left)}"
        )


def peak_bytes() -> int | None:
    """Peak memory of the process: the accelerator's, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def arguments(recipe: Recipe, output: Path, has_eval: bool) -> dict[str, Any]:
    """Arguments for `TrainingArguments` (or a class of its kind) from a recipe."""
    train, pretraining = recipe.train, recipe.task == "pretrain"
    schedule = {"constant": "constant_with_warmup" if train.warmup else "constant"}
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": recipe.evaluate.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "max_steps": -1 if (steps := recipe.steps()) is None else steps,
        # Windows of tokens hold all passes already.
        "num_train_epochs": 1.0 if train.epochs is None or pretraining else train.epochs,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": schedule.get(train.schedule, train.schedule),
        "warmup_steps": train.warmup,
        "weight_decay": train.weight_decay,
        "optim": "adamw_torch" if train.optimizer in OWN_OPTIMIZERS else train.optimizer,
        "optim_target_modules": _projected(train),
        "optim_args": None
        if train.optimizer in OWN_OPTIMIZERS
        else ",".join(f"{k}={v}" for k, v in train.optimizer_settings.items()) or None,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "adam_epsilon": train.eps,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        # One block in n is not the trainer's business: models.save_memory does it.
        "activation_checkpointing": train.gradient_checkpointing is True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": train.autocast and recipe.dtype != "float16",
        "fp16": train.autocast and recipe.dtype == "float16",
        "logging_steps": train.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if train.eval_every and has_eval else "no",
        "eval_steps": train.eval_every,
        "prediction_loss_only": True,
        "save_strategy": "steps" if train.save_every else "no",
        "save_steps": train.save_every or 500,
        "save_total_limit": train.keep,
        "report_to": ["tensorboard"] if train.tensorboard else [],
        "train_sampling_strategy": "group_by_length" if train.group_by_length else "random",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _projected(train: TrainSection) -> str | list[str] | None:
    """Layers whose gradients a low-rank optimizer projects."""
    if train.optimizer.startswith(("galore", "apollo")):
        return train.optimizer_targets or "all-linear"
    return None if train.optimizer in OWN_OPTIMIZERS else train.optimizer_targets


def _plain(model: Any) -> Any:
    """The model inside of PEFT's."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def build_trainer(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    output: Path,
    record: Record,
    say: Callable[[str], None],
    strategy: Strategy = "ddp",
    tensor_parallel: int = 1,
) -> Any:
    """The trainer that fits the data: Hugging Face's, or TRL's for conversations."""
    widened = widen_biases(model) if strategy == "fsdp2" else {}
    settings = arguments(recipe, output, data.eval is not None)
    if tensor_parallel == 1:
        settings |= sharding(strategy, model)
    elif settings["optim"] == "adamw_torch_fused":
        settings["optim"] = "adamw_torch"  # one kernel can't take whole and split parameters
    shared = {
        "model": model,
        "train_dataset": data.train,
        "eval_dataset": data.eval,
        "processing_class": tokenizer,
        "callbacks": [
            RecordCallback(record, say, "images" if recipe.task.startswith("image") else "tokens")
        ],
    }
    if data.format == "chat":
        from velora_torch.training.sft import build_chat_trainer

        trainer = build_chat_trainer(recipe, data, settings, shared)
    else:
        trainer = RecordingTrainer(
            args=TrainingArguments(**settings), data_collator=data.collator, **shared
        )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.record = record
    trainer.say, trainer.policy = say, recipe.train
    trainer.add_callback(StopWhenAsked(trainer))
    trainer.longest_first = recipe.train.longest_first
    trainer.widened = widened
    trainer.shard_checkpoints = recipe.train.shard_checkpoints
    if tensor_parallel > 1 and strategy == "fsdp2":
        trainer.shards = shards_of(model)
    trainer.zero_stage, trainer.tensor_parallel = zero_stage(strategy), tensor_parallel
    if recipe.train.optimizer in OWN_OPTIMIZERS:
        trainer.own_optimizer = recipe.train
    if recipe.train.head_learning_rate is not None:
        trainer.head_rate = recipe.train.head_learning_rate
        trainer.head = tuple(head_of(_plain(model), recipe) or ())
    trainer.layer_rates = recipe.train.learning_rates
    trainer.coefficient_rate = recipe.train.coefficient_learning_rate
    trainer.restarts = Restarts.of(recipe)
    if trainer.restarts is not None:
        trainer.add_callback(RestartAdapters(trainer))
    return trainer
