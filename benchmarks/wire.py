"""Bytes that a step's gradients put on the wire, plain and with VeLoRA, under DDP and FSDP2.

    python benchmarks/wire.py

A LLaMA of llama-3m's shape, every linear layer of its blocks compressed with M = 8, in two gloo
processes; a row for each strategy and method in benchmarks/results/wire.jsonl. Counted by a
communication hook (DDP) or at the process group (FSDP2), in the second step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import velora_torch as velora
from velora_torch.memory.wire import Wire
from velora_torch.model import compressed_layers
from velora_torch.report.environment import machine_info, version_info

ROWS = Path(__file__).parent / "results" / "wire.jsonl"
RANKS, M = 2, 8


def model_of(compressed: bool) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    )
    if compressed:
        config = velora.VeloraConfig(sub_token_size=M, init="rademacher", vectors="per_group")
        velora.compress(model, config)
    return model.train()


def measure(rank: int, store: str, strategy: str, compressed: bool, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    model: Any = model_of(compressed)
    counted: list[int] = []
    wrapped: Any = model
    if strategy == "ddp":
        wrapped = DistributedDataParallel(model)

        def hook(state: Any, bucket: Any) -> Any:
            counted.append(bucket.buffer().numel() * bucket.buffer().element_size())
            everyone: Any = dist.group.WORLD
            return allreduce_hook(everyone, bucket)

        hook.__annotations__ = {
            "bucket": dist.GradBucket,
            "return": torch.futures.Future[torch.Tensor],
        }
        wrapped.register_comm_hook(None, hook)
    else:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    tokens = torch.randint(4096, (2, 16))
    for _ in range(2):
        counted.clear()
        with Wire() as wire:
            wrapped(input_ids=tokens, labels=tokens).loss.backward()
    layers = compressed_layers(model).values()
    if rank == 0:
        row = {
            "strategy": strategy,
            "method": "velora" if compressed else "plain",
            "ranks": RANKS,
            "sub_token_size": M if compressed else None,
            "gradient_bytes": sum(counted) if strategy == "ddp" else wire.reduced,
            "gathered_bytes": wire.gathered,
            "coefficients": sum(layer.outputs * layer.velora.groups for layer in layers),
            "weights": sum(layer.outputs * layer.features for layer in layers),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        Path(out).write_text(json.dumps(row))
    dist.destroy_process_group()


def main() -> None:
    around = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": dataclasses.asdict(machine_info()),
        "versions": version_info(),
    }
    with ROWS.open("a", encoding="utf-8") as rows:
        for strategy in ("ddp", "fsdp2"):
            for compressed in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    out = f"{folder}/row.json"
                    multiprocessing.spawn(
                        measure, (f"{folder}/store", strategy, compressed, out), nprocs=RANKS
                    )
                    row = json.loads(Path(out).read_text())
                print({key: row[key] for key in ("strategy", "method", "gradient_bytes")})
                rows.write(json.dumps(row | around) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
