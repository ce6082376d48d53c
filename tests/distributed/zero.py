"""A short training by DeepSpeed's ZeRO, in processes that are started for it alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.training import Setup, batches, build, full
from velora_torch.checkpoint import load_state, save_state
from velora_torch.integrations.deepspeed import split_by_type
from velora_torch.layers.adapter import compressed_adapters
from velora_torch.model import compressed_layers

FOLDER = Path(sys.prefix) / "deepspeed"
"""Where `make test` installs it: beside the other packages, which would all import it."""


def is_installed() -> bool:
    return (FOLDER / "deepspeed").is_dir()


def deepspeed() -> Any:
    """The package, on the CPU and without operators that it would compile first."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    import deepspeed as package

    package.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return package


def make_optimizer(setup: Setup, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer with two groups, or more: ZeRO has a flat tensor of its own for each."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
        "sgd": partial(torch.optim.SGD, lr=1e-1, momentum=0.9),
        "adadelta": torch.optim.Adadelta,
    }
    optimizer = kinds[setup.optimizer]([{"params": trained[:5]}, {"params": trained[5:]}])
    split_by_type(optimizer)
    return optimizer


def start(setup: Setup, settings: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The compressed model, and the engine that trains it."""
    model = build(setup)
    config = {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "gradient_accumulation_steps": setup.accumulation,
        "gradient_clipping": setup.clip or 0.0,
        "zero_optimization": {"stage": int(setup.strategy.removeprefix("zero"))},
        "zero_allow_untested_optimizer": True,
        **settings,
    }
    optimizer = make_optimizer(setup, [p for p in model.parameters() if p.requires_grad])
    engine, *_ = deepspeed().initialize(model=model, optimizer=optimizer, config=config)
    return model, engine


def step(setup: Setup, engine: Any, tokens: Tensor, factor: float = 1.0) -> None:
    """One step on this rank's part of the tokens, (accumulation, BATCH, LENGTH)."""
    for micro in tokens:
        mine = micro.chunk(dist.get_world_size())[dist.get_rank()]
        engine.backward(engine(input_ids=mine, labels=mine).loss * factor)
        engine.step()


def state(model: nn.Module) -> dict[str, Any]:
    """The weights, vectors and counters."""
    result: dict[str, Any] = {name: full(p) for name, p in model.named_parameters()}
    for name, layer in compressed_layers(model).items():
        result[f"{name}.vectors"] = layer.velora_vectors.clone()
        result[f"{name}.counters"] = layer.velora.counters()
    for name, adapter in compressed_adapters(model).items():
        for key, site in adapter.velora_adapter.sites.items():
            result[f"{name}.{key}.vectors"] = site.vectors.clone()
    return result


def train(setup: Setup, settings: Mapping[str, Any] = {}) -> dict[str, Any]:
    model, engine = start(setup, settings)
    for tokens in batches(setup):
        step(setup, engine, tokens)
    assert type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer"
    return state(model)


def train_all(setups: Mapping[str, Setup]) -> dict[str, dict[str, Any]]:
    """One training after the other."""
    return {name: train(setup) for name, setup in setups.items()}


def overflow(setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a step with infinite gradients finds, and what it leaves."""
    model, engine = start(setup, {"bf16": {"enabled": True, "check_grad_overflow": True}})
    tokens = batches(setup)
    step(setup, engine, tokens[0])
    before = state(model)
    step(setup, engine, tokens[1], float("inf"))
    assert engine.optimizer.overflow
    return before, state(model)


def save_and_resume(setup: Setup, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a training ends with, and what one that is stopped in its middle and resumed does."""
    model, engine = start(setup, {})
    tokens = batches(setup)
    for one in tokens[:5]:
        step(setup, engine, one)
    engine.save_checkpoint(folder)
    save_state(model, folder, dist.get_rank() == 0)
    for one in tokens[5:]:
        step(setup, engine, one)
    expected = state(model)
    model, engine = start(setup, {})
    engine.load_checkpoint(folder)
    load_state(model, folder)
    for one in tokens[5:]:
        step(setup, engine, one)
    return expected, state(model)


def refusal(setup: Setup, settings: Mapping[str, Any]) -> str:
    """Why a first step is refused."""
    _, engine = start(setup, settings)
    try:
        step(setup, engine, batches(setup)[0])
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "not refused"
