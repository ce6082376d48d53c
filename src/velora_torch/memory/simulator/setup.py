"""One way to train: what is trained, compressed and computed again, and by which optimizer."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from velora_torch.config import VeloraConfig, check_choice
from velora_torch.memory.fake import FakeWorld, skeleton
from velora_torch.memory.simulator.four_bit import quantise_like_bitsandbytes
from velora_torch.memory.simulator.optimizers import OPTIMIZERS, make_optimizer
from velora_torch.model import compress
from velora_torch.recomputation import checkpoint_blocks, recompute

Method = Literal["full", "lora", "qlora"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained, as far as memory and arithmetic depend on it."""

    method: Method = "full"
    """``full`` trains what requires a gradient, ``lora`` PEFT adapters, ``qlora`` adapters on a
    4-bit base."""
    velora: VeloraConfig | None = None
    """Compression; ``None`` trains without."""
    checkpoint_every: int | None = None
    """Gradient checkpointing of every n-th block; 1 checkpoints all, ``None`` none."""
    recompute: bool = False
    """Norms and activations save only what they cannot recompute."""
    chunked_loss: bool = False
    """The loss is computed from the last hidden states in chunks; logits are never whole."""
    optimizer: str = "adamw"
    """One of ``simulator.optimizers.OPTIMIZERS``."""
    galore_rank: int = 128
    """Rank of the gradients' projection, with ``optimizer="galore_adamw"``."""
    accumulation: int = 1
    """Micro-batches of one optimizer step."""
    lora_rank: int = 16
    lora_targets: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    adapters_in_float32: bool = True
    """PEFT keeps adapters of a 16-bit model in float32 by default, and casts their inputs to it."""
    double_quantization: bool = True

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        for name in ("accumulation", "lora_rank", "galore_rank", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}"
            )

    @property
    def extrapolates(self) -> bool:
        """Whether all blocks are treated alike, whatever their number."""
        targets: list[Any] = [self.lora_targets]
        if self.velora is not None:
            targets += [self.velora.targets, self.velora.num_groups, self.velora.sub_token_size]
        return not any(callable(t) or any(c.isdigit() for c in _names(t)) for t in targets)

    def apply(
        self, model: nn.Module, world: FakeWorld | None = None, device: str = "cuda"
    ) -> tuple[nn.Module, Optimizer]:
        """Prepare a model as this setup says.

        Args:
            model: in train mode; use the one that is returned, since adapters wrap it.
            world: where the model's fake tensors live, not entered; ``None`` for real ones.
            device: ``cuda`` lets the optimizer work on all parameters at once, as torch does there.
        """
        inside = contextlib.nullcontext() if world is None else world
        if self.method == "qlora":
            with inside:
                quantise_like_bitsandbytes(model, double=self.double_quantization)
        if self.method != "full":
            model = self._with_adapters(model, world)
        if self.recompute or self.chunked_loss:  # not inside: it tries modules on real numbers
            recompute(
                model, norms=self.recompute, activations=self.recompute, loss=self.chunked_loss
            )
        with inside:
            self._save_memory(model)
            optimizer = make_optimizer(self.optimizer, model, self.galore_rank)
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = device == "cuda"
        return model, optimizer

    def _save_memory(self, model: nn.Module) -> None:
        if self.velora is not None:
            compress(model, self.velora)
        if self.checkpoint_every is not None:
            checkpoint_blocks(model, self.checkpoint_every)
            if self.method != "full":
                _let_gradients_through(model)

    def _with_adapters(self, model: nn.Module, world: FakeWorld | None) -> nn.Module:
        if importlib.util.find_spec("peft") is None:
            raise ValueError(f"method {self.method} needs peft: pip install 'velora-torch[peft]'")
        from peft import LoraConfig, get_peft_model

        targets = self.lora_targets
        config = LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank,
            lora_dropout=self.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
        cast = self.adapters_in_float32
        if world is None:
            return get_peft_model(model, config, autocast_adapter_dtype=cast).train()
        with torch.device("meta"):
            adapted = get_peft_model(skeleton(model), config, autocast_adapter_dtype=cast)
        _type_adapters(adapted, cast)
        return world.model(adapted.train())

    def plain(self) -> Setup:
        """The same training without any saving: what a step's cost is compared with."""
        return Setup(
            method=self.method,
            accumulation=self.accumulation,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            lora_dropout=self.lora_dropout,
            adapters_in_float32=self.adapters_in_float32,
            double_quantization=self.double_quantization,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["velora"] = None if self.velora is None else self.velora.to_dict()
        if not isinstance(self.lora_targets, str):
            values["lora_targets"] = list(self.lora_targets)
        return values

    def __str__(self) -> str:
        """One line, such as ``full, checkpointing, VeLoRA on all linear layers, adamw``."""
        parts: list[str] = [self.method]
        if self.checkpoint_every is not None:
            every = self.checkpoint_every
            parts.append("checkpointing" if every == 1 else f"checkpointing of 1 in {every}")
        if self.velora is not None:
            parts.append(f"VeLoRA on {_describe(self.velora)}")
        if self.recompute:
            parts.append("recomputed norms and activations")
        if self.chunked_loss:
            parts.append("chunked loss")
        parts.append(self.optimizer)
        if self.accumulation > 1:
            parts.append(f"{self.accumulation} micro-batches")
        return ", ".join(parts)


def _describe(config: VeloraConfig) -> str:
    targets = config.targets
    if callable(targets):
        return "chosen layers"
    layers = targets if isinstance(targets, str) else "+".join(targets)
    size = f"M={config.sub_token_size}" if config.sub_token_size else f"G={config.num_groups}"
    return f"{layers} ({size})"


def _names(targets: Any) -> str:
    if targets is None or isinstance(targets, int):
        return ""
    return targets if isinstance(targets, str) else " ".join(map(str, targets))


def _let_gradients_through(model: nn.Module) -> None:
    """Embeddings are frozen: without a gradient in their output, checkpointing trains nothing."""
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None:
        enable()


def _type_adapters(model: nn.Module, in_float32: bool) -> None:
    """PEFT gives adapters the type of their base layer, but not on meta."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            dtype = module.get_base_layer().weight.dtype
            if not dtype.is_floating_point:
                continue
            small = torch.finfo(dtype).bits < 32
            for name in module.adapter_layer_names:
                getattr(module, name).to(torch.float32 if small and in_float32 else dtype)


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """The floating-point type of a name such as ``bfloat16``.

    Raises:
        ValueError: there is no such type.
    """
    if isinstance(name, torch.dtype):
        return name
    check_choice("dtype", name, ("bfloat16", "float16", "float32", "float64"))
    dtype: torch.dtype = getattr(torch, name)
    return dtype
