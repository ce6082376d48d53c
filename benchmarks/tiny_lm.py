"""A small LLaMA over bytes of English text, for benchmarks that compare training runs.

The text is the reference manual that ships inside Python (``pydoc_data.topics``, 0.45 MB), so that
nothing has to be downloaded. The last tenth is held out.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from velora_torch.report.environment import machine_info, version_info

BATCH, LENGTH = 4, 128
WIDTH, LAYERS = 128, 2
TEXT = torch.frombuffer(
    bytearray("\n".join(topics[key] for key in sorted(topics)).encode()), dtype=torch.uint8
).long()
HELD_OUT = TEXT.numel() // 10

Optimize = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def model(seed: int) -> LlamaForCausalLM:
    """An untrained model of 0.47 million parameters, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def batches(seed: int) -> Iterator[Tensor]:
    """Random pieces of the training text, (batch, length), without end."""
    generator = torch.Generator().manual_seed(seed)
    last = TEXT.numel() - HELD_OUT - LENGTH
    while True:
        starts = torch.randint(0, last, (BATCH,), generator=generator)
        yield torch.stack([TEXT[start : start + LENGTH] for start in starts.tolist()])


def train(
    lm: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int
) -> torch.optim.Optimizer:
    """Train on ``steps`` batches; the order depends on the seed alone."""
    lm.train()
    stream = batches(seed)
    for _ in range(steps):
        ids = next(stream)
        lm(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def held_out_loss(lm: nn.Module) -> float:
    """Mean loss over the held-out text, computed in float32 from a copy of the weights."""
    wide = copy.deepcopy(lm).float().eval()
    pieces = TEXT[-HELD_OUT:].unfold(0, LENGTH, LENGTH)
    losses = [wide(input_ids=ids, labels=ids).loss.double() for ids in pieces[:256].split(32)]
    return float(torch.stack(losses).mean())


def freeze_all_but_linear_layers(lm: LlamaForCausalLM) -> None:
    """Leave only the linear layers of the blocks to train: what is compressed, and nothing else."""
    lm.requires_grad_(False)
    for module in lm.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(True)


def block_weights(lm: LlamaForCausalLM) -> Tensor:
    """All weights of the linear layers of the blocks, one float64 vector."""
    modules = [m for m in lm.model.layers.modules() if isinstance(m, nn.Linear)]
    return torch.cat([m.weight.detach().double().flatten() for m in modules])


def write_rows(path: Path, rows: list[dict[str, Any]], command: str) -> None:
    """One JSON object per line, each with the command, the machine and the versions."""
    common = {
        "command": command,
        "machine": dataclasses.asdict(machine_info()),
        "versions": version_info(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({**row, **common}) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
