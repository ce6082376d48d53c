"""A short training in float64, alone or as one of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import velora_torch as velora
from velora_torch.layers.adapter import compressed_adapters
from velora_torch.model import compressed_layers

BATCH, LENGTH, VOCABULARY = 8, 6, 48


@dataclass
class Setup:
    """What is trained, and how."""

    strategy: str = "ddp"
    method: str = "full"
    config: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.float64
    steps: int = 20
    accumulation: int = 1
    clip: float | None = None


def llama() -> nn.Module:
    """Two blocks, with widths that neither ranks nor groups divide evenly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=21,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Two blocks of Conv1D, whose weights are stored as (D, O)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=10,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


class Experts(nn.Module):
    """A language model in which each half of the vocabulary has an expert, and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """Tokens below the middle go to expert 0, the others to expert 1."""
        x = self.embed(input_ids)
        high = input_ids >= VOCABULARY // 2
        y = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (~high, high), strict=False):
            if chosen.any():
                y = y.masked_scatter(chosen.unsqueeze(-1), expert(x[chosen]).tanh())
        logits = self.head(x + y)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return _Output(loss)


@dataclass
class _Output:
    loss: Tensor


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "experts": Experts,
}


def build(setup: Setup) -> nn.Module:
    """The compressed model, in training mode."""
    torch.manual_seed(0)
    model = FAMILIES[setup.family]().to(setup.dtype)
    if setup.method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config).to(setup.dtype)  # type: ignore[arg-type]
    elif setup.method == "loha":  # computes with its parameters itself
        from peft import LoHaConfig, get_peft_model

        targets = ["q_proj", "up_proj"]
        config = LoHaConfig(r=4, target_modules=targets, init_weights=False)
        model = get_peft_model(model, config).to(setup.dtype)  # type: ignore[arg-type]
    return velora.compress(model.train(), velora.VeloraConfig(**setup.config))


def distribute(model: nn.Module, strategy: str) -> nn.Module:
    """Wrap or shard a compressed model."""
    if strategy == "ddp":
        skips = isinstance(model, Experts)
        return DistributedDataParallel(model, find_unused_parameters=skips)
    for module in model.modules():
        if type(module).__name__ in ("LlamaDecoderLayer", "GPT2Block"):
            fully_shard(module)
    return fully_shard(model)


def batches(setup: Setup) -> Tensor:
    """The tokens of all ranks, (steps, accumulation, BATCH, LENGTH).

    For experts the first half of every batch has tokens of expert 0 alone, the other those of 1.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (setup.steps, setup.accumulation, BATCH, LENGTH)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    if setup.family == "experts":
        low, high = tokens.chunk(2, dim=2)
        tokens = torch.cat((low % (VOCABULARY // 2), VOCABULARY // 2 + high % 24), dim=2)
    return tokens


def full(tensor: Tensor) -> Tensor:
    """A tensor with what all ranks hold of it."""
    whole: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return (tensor if whole is None else whole()).detach().clone()


def make_optimizer(setup: Setup, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer whose eps does not matter, with weight decay."""
    if setup.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=1e-2, eps=1e-30, weight_decay=0.1)
    return torch.optim.SGD(trained, lr=1e-1, momentum=0.9)


def train(setup: Setup) -> dict[str, Tensor]:
    """Train on this rank's part of every batch; the whole weights and the vectors at the end."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = build(setup)
    wrapped = distribute(model, setup.strategy) if ranks > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(setup, trained)
    for step in batches(setup):
        for micro in step:
            mine = micro.chunk(ranks)[rank]
            loss = wrapped(input_ids=mine, labels=mine).loss
            (loss / setup.accumulation).backward()
        if setup.clip is not None:
            nn.utils.clip_grad_norm_(trained, setup.clip)
        optimizer.step()
        optimizer.zero_grad()
    result = {name: full(p) for name, p in model.named_parameters()}
    layers = compressed_layers(model)
    result |= {f"{n}.vectors": layer.velora_vectors.clone() for n, layer in layers.items()}
    for name, adapter in compressed_adapters(model).items():
        for key, site in adapter.velora_adapter.sites.items():
            result[f"{name}.{key}.vectors"] = site.vectors.clone()
    return result


def train_all(setups: Mapping[str, Setup]) -> dict[str, dict[str, Tensor]]:
    """One training after the other."""
    return {name: train(setup) for name, setup in setups.items()}
