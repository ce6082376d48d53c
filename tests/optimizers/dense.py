"""An independent dense VeLoRA to compare with: the paper's Algorithm 1, by the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import velora_torch as velora
from velora_torch.subtoken import reference

LR = 3e-2
WIDTH, HIDDEN, OUTPUTS = 13, 22, 5
# 13 features in 4 groups of 4 and in 6 of 3 (the last group has no feature), 22 in 11 of 2.
GROUPS = {"up": 4, "down": 11, "last": 6}
LAYERS = tuple(GROUPS)

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]


class Block(nn.Module):
    """Norm, MLP with a residual, and a last layer: every size odd or not divisible."""

    def __init__(self, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = linear(WIDTH, HIDDEN)
        self.down = linear(HIDDEN, WIDTH, bias=False)
        self.last = linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.down(torch.tanh(self.up(self.norm(x)))))


class _Paper(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, v)
        ctx.scale = scale
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, v = ctx.saved_tensors
        dX, dW, _ = reference.linear_gradients(x, weight, dY.to(x.dtype), v, ctx.scale)
        return dX, dW, None, None


class PaperLinear(nn.Linear):
    """A linear layer whose weight gradient is the dense one of the paper."""

    scale = 1.0
    twin: Any  # (compressed layer,): its vectors are used, and it is not a submodule

    def forward(self, x: Tensor) -> Tensor:
        y = _Paper.apply(x, self.weight, self.twin[0].velora_vectors.clone(), self.scale)
        return y if self.bias is None else y + self.bias


def config(**fields: Any) -> velora.VeloraConfig:
    return velora.VeloraConfig(**{"num_groups": GROUPS, "init": "average", **fields})


def pair(dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[Block, Block]:
    """A compressed model, and the dense reference with the same weights and the same vectors."""
    torch.manual_seed(0)
    model = Block().to(dtype)
    paper = Block(PaperLinear).to(dtype)
    paper.load_state_dict(model.state_dict())
    velora.compress(model, config(**fields))
    for name in LAYERS:
        layer = paper.get_submodule(name)
        layer.twin = (model.get_submodule(name),)
        layer.scale = model.get_submodule(name).velora.config.scale
    return model, paper


def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64).to(dtype) + 0.3,
            torch.randn(2, 5, OUTPUTS, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(steps)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return (model(x) - target).square().mean()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def train_both(
    models: tuple[Block, Block], make: MakeOptimizer, steps: int = 50, one_step: Any = step
) -> float:
    """Train both; the compressed one first, since it draws the vectors. See :func:`difference`."""
    start = copy.deepcopy(models[1].state_dict())
    optimizers = [make(trainable(model)) for model in models]
    for batch in batches(steps, models[0].norm.weight.dtype):
        for model, optimizer in zip(models, optimizers, strict=True):
            one_step(model, optimizer, batch)
    return difference(models, start)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def difference(models: tuple[Block, Block], start: dict[str, Tensor]) -> float:
    """Largest relative difference between the changes of a tensor in the two models."""
    ours, theirs = (model.state_dict() for model in models)
    assert ours.keys() == theirs.keys() == start.keys()
    errors = []
    for key in start:
        change = theirs[key] - start[key]
        assert change.abs().max() > 0, f"{key} was not trained"
        errors.append(float((ours[key] - theirs[key]).abs().max() / change.abs().max()))
    return max(errors)
