"""PEFT's methods on tiny models, and what of each must come out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.layers.adapter import CompressedAdapter

from ..tiny_models import MODELS

GROUPS = 4
IGNORED = (
    "ignore::FutureWarning",
    "ignore:.*fan_in_fan_out.*",
    "ignore:Unmerge result can be",
    "ignore:.*LoRA tensor.s. have invalid shape",
    "ignore:Unsupported layer type",
)
"""Warnings of PEFT and transformers that say nothing about us."""

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "output.dense"],
    "vit": ["q_proj", "fc2"],
}
FEEDFORWARD = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["output.dense"], "vit": []}


@dataclass(frozen=True)
class Method:
    """How to make an adapter, and which of its parameters get which gradient."""

    config: Callable[[str], Any]
    rebuilt: tuple[str, ...]
    """Get the gradient that they would get if the adapter's input were the rebuilt one."""
    exact: tuple[str, ...] = ()
    """Get the gradient of plain PEFT."""
    models: tuple[str, ...] = ("llama", "bert", "vit", "gpt2")


def conv1d(name: str) -> dict[str, Any]:
    return {"target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"}


def lora(**settings: Any) -> Callable[[str], Any]:
    return lambda name: peft.LoraConfig(r=3, lora_alpha=6, **conv1d(name), **settings)


A, B = ("lora_A",), ("lora_B",)
LINEAR_ONLY = ("llama", "bert", "vit")

METHODS: dict[str, Method] = {
    "lora": Method(lora(), A, B),
    "rslora": Method(lora(use_rslora=True), A, B, ("llama", "gpt2")),
    "dora": Method(lora(use_dora=True), A, ("lora_B", "lora_magnitude_vector")),
    "pissa": Method(lora(init_lora_weights="pissa"), A, B, ("llama",)),
    "olora": Method(lora(init_lora_weights="olora"), A, B, ("llama",)),
    "lora-bias": Method(lora(lora_bias=True), A, B, ("vit",)),
    "adalora": Method(
        lambda name: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, **conv1d(name)),
        ("lora_A", "lora_E"),
        B,
    ),
    "loha": Method(
        lambda name: peft.LoHaConfig(r=3, target_modules=TARGETS[name]),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        models=LINEAR_ONLY,
    ),
    "lokr": Method(
        lambda name: peft.LoKrConfig(r=2, target_modules=TARGETS[name]),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        models=LINEAR_ONLY,
    ),
    "fourierft": Method(
        lambda name: peft.FourierFTConfig(n_frequency=20, **conv1d(name)),
        ("fourierft_spectrum",),
        models=LINEAR_ONLY,
    ),
    "hra": Method(
        lambda name: peft.HRAConfig(r=4, target_modules=TARGETS[name]),
        ("hra_u",),
        models=LINEAR_ONLY,
    ),
    "vblora": Method(
        lambda name: peft.VBLoRAConfig(
            r=3, num_vectors=16, vector_length=8, topk=2, **conv1d(name)
        ),
        ("vblora_logits_A",),
        ("vblora_logits_B",),
    ),
    "delora": Method(
        lambda name: peft.DeloraConfig(r=3, target_modules=TARGETS[name]),
        (),
        models=LINEAR_ONLY,
    ),
    "vera": Method(
        lambda name: peft.VeraConfig(
            r=3, target_modules=TARGETS[name][:1], fan_in_fan_out=name == "gpt2"
        ),
        (),
        ("vera_lambda_d",),
    ),
    "ia3": Method(
        lambda name: peft.IA3Config(feedforward_modules=FEEDFORWARD[name], **conv1d(name)), ()
    ),
}
"""Methods that are compressed."""

EXACT: dict[str, tuple[Callable[[], Any], str]] = {
    "oft": (
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS["llama"]),
        "oft.Linear does not multiply an activation by one trained matrix or scale",
    ),
    "c3a": (
        lambda: peft.C3AConfig(block_size=8, target_modules=TARGETS["llama"]),
        "c3a.C3ALinear does not multiply an activation by one trained matrix or scale",
    ),
    "miss": (
        lambda: peft.MissConfig(r=4, target_modules=TARGETS["llama"]),
        "the trained matrices of miss.MissLinear take no input of full width",
    ),
    "ln-tuning": (
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "adapts a LlamaRMSNorm, which is not a linear layer",
    ),
    "lora-embedding": (
        lambda: peft.LoraConfig(r=3, target_modules=["embed_tokens"]),
        "adapts a Embedding, which is not a linear layer",
    ),
    "prompt-tuning": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "Embedding is not a linear layer",
    ),
}
"""Methods that leave nothing to compress, and the reason."""

PAIRS = [(method, model) for method, spec in METHODS.items() for model in spec.models]


def adapted(method: str, name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model with an adapter that is not at its start, where many of its gradients are zero."""
    base = MODELS[name][0]()  # in float32, as PiSSA wants it
    model = peft.get_peft_model(base, METHODS[method].config(name)).to(dtype)
    return disturb(model).train()


@torch.no_grad()
def disturb(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise.to(parameter.dtype))
    return model


def compressed(model: Any, **settings: Any) -> Any:
    config = VeloraConfig(**({"num_groups": GROUPS} | settings))
    return velora_torch.compress(copy.deepcopy(model), config)


def compressed_modules(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (CompressedLayer, CompressedAdapter)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The adapted layers."""
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def batch_of(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    batch = MODELS[name][1](seed)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The input ``x`` of a module, and the gradient ``dY`` of its output."""
    seen: dict[str, Tensor] = {}

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"] = args[0].detach().clone()
        output.register_hook(lambda grad: seen.__setitem__("dY", grad.detach().clone()))

    handle = module.register_forward_hook(note)
    yield seen
    handle.remove()
