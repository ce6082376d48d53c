"""A step of architectures that are split over processes by their own plans, and whole again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import velora_torch as velora
from tests.architectures.architecture import Architecture
from tests.architectures.catalogue import CATALOGUE
from tests.architectures.promises import loss_of, plain_model, run
from velora_torch.integrations.tensor_parallel import PlanError, SplitModel, check_plan
from velora_torch.sharding import is_sharded

CONFIG = velora.VeloraConfig(num_groups=4, init="rademacher", refresh_every=1)


def split_architectures() -> list[str]:
    """Names of those that have a plan that can be followed."""
    return [a.name for a in CATALOGUE if not refusal(a)]


def refusal(architecture: Architecture) -> str:
    """Why one can't be split; nothing where it can."""
    try:
        check_plan(plain_model(architecture), 2)
    except PlanError as error:
        return str(error)
    return ""


def step(architecture: Architecture) -> dict[str, Tensor]:
    """Two training steps, in float64; the outputs of the first, and all weights at the end."""
    model: Any = plain_model(architecture).double()
    model.set_experts_implementation("eager")  # others have no kernel for float64
    velora.compress(model, CONFIG).train()
    several = dist.is_initialized()
    if several:
        whole = SplitModel(model, dist.get_world_size())
        assert any(is_sharded(p) for p in model.parameters())
        assert style_hooks(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-8, foreach=False)
    result: dict[str, Tensor] = {}
    for seed in range(2):
        batch = {
            name: value.double() if value.is_floating_point() else value
            for name, value in architecture.batch(seed).items()
        }
        outputs = run(model, batch)
        loss_of(outputs).backward()
        if several:
            whole.sum_gradients()
        optimizer.step()
        optimizer.zero_grad()
        result |= {f"output {n} of step {seed}": y.detach() for n, y in enumerate(outputs)}
    if several:
        whole.join()
        assert not any(is_sharded(t) for t in (*model.parameters(), *model.buffers()))
        assert not style_hooks(model)
    return result | {n: p.detach().clone() for n, p in velora.restore(model).named_parameters()}


def shared_random() -> tuple[float, float]:
    """What is drawn after processes with other random numbers have agreed."""
    (llama,) = (a for a in CATALOGUE if a.name == "llama")
    split = SplitModel(plain_model(llama), dist.get_world_size())
    random.seed(dist.get_rank())
    torch.manual_seed(dist.get_rank())
    split.share_random()
    return random.random(), float(torch.rand(()))


def style_hooks(model: nn.Module) -> list[Any]:
    """Those that split what a layer takes, and join what it gives."""
    found = (
        h
        for m in model.modules()
        for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
    )
    return [
        hook
        for hook in found
        if "tensor.parallel" in repr(hook) or "distribute_module" in repr(hook)
    ]


def steps(names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The same of several, by name."""
    return {a.name: step(a) for a in CATALOGUE if a.name in names}
