"""Tensor parallel of a tiny LLaMA, alone or beside FSDP2; what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import velora_torch as velora
from tests.distributed.training import full
from velora_torch.layers.scale_shift import ScaleShift
from velora_torch.model import compressed_layers

BATCH, LENGTH, VOCABULARY, WIDTH = 4, 6, 48, 16
COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@dataclass
class Split:
    """What is trained, how, and over how many ranks each layer is split."""

    config: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    bias: bool = False
    steps: int = 4
    recompute: bool = False


def llama(setup: Split) -> nn.Module:
    """The compressed model, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=setup.bias,
        mlp_bias=setup.bias,
    )
    model = LlamaForCausalLM(config).double().train()
    if setup.recompute:
        for block in model.model.layers:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return velora.compress(model, velora.VeloraConfig(**setup.config))


def split(model: nn.Module, width: int) -> None:
    """Split each block's layers over `width` ranks, and shard what is left over the others."""
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // width, width), mesh_dim_names=("data", "tensor")
    )
    blocks = model.model.layers
    for block in blocks:
        plan = {
            name: ColwiseParallel() if name.split(".")[-1] in COLWISE else RowwiseParallel()
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        parallelize_module(block, mesh["tensor"], plan)
    if mesh.size(0) > 1:
        for block in blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])


def train(setup: Split, width: int = 2) -> dict[str, Tensor]:
    """Train on this rank's part of every batch; the whole weights and the vectors at the end."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model = llama(setup)
    share, part = 1, 0
    if ranks > 1:
        split(model, width)
        share, part = ranks // width, dist.get_rank() // width
    trained = [p for p in model.parameters() if p.requires_grad]
    if setup.optimizer == "adamw":
        optimizer: Any = torch.optim.AdamW(trained, lr=1e-2, eps=1e-30, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(trained, lr=1e-1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(setup.steps):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
        mine = tokens.chunk(share)[part]
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    velora.check_ranks(model)
    result = {name: full(p) for name, p in model.named_parameters()}
    layers = compressed_layers(model)
    return result | {f"{n}.vectors": layer.velora_vectors.clone() for n, layer in layers.items()}


def train_all(setups: Mapping[str, Split]) -> dict[str, dict[str, Tensor]]:
    """One training after the other."""
    return {name: train(setup) for name, setup in setups.items()}


def refusals() -> dict[str, str]:
    """What is said about splits that are not supported, before anything is trained."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    x = torch.ones(4, WIDTH)
    said = {}

    def told(name: str, call: Any) -> None:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)

    def compressed(module: nn.Module, groups: int) -> nn.Module:
        config = velora.VeloraConfig(targets=["0"], num_groups=groups)
        return velora.compress(nn.Sequential(module), config)

    def split_so(model: nn.Module, style: Any) -> nn.Module:
        return parallelize_module(model, mesh, {"0": style})

    between = split_so(compressed(nn.Linear(WIDTH, 8), 3), RowwiseParallel(input_layouts=Shard(-1)))
    told("between groups", lambda: between(x[:, :8]))
    scale = compressed(ScaleShift(WIDTH), 4)
    told("scale", lambda: scale(distribute_tensor(x, mesh, [Replicate()])))
    plain_input = compressed(nn.Linear(WIDTH, 8), 4)
    layer: Any = plain_input[0]  # type: ignore[index]
    for name in ("weight", "coef", "bias"):
        parameter = layer._parameters[name]
        shards = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        layer.register_parameter(name, nn.Parameter(shards, parameter.requires_grad))
    told("plain input", lambda: plain_input(x))
    told("other layout", lambda: plain_input(distribute_tensor(x, mesh, [Shard(0)])))
    already = split_so(
        nn.Sequential(nn.Linear(WIDTH, 8)), ColwiseParallel(input_layouts=Replicate())
    )
    told(
        "already",
        lambda: velora.compress(already, velora.VeloraConfig(targets=["0"], num_groups=4)),
    )
    return said
