"""Optimizers for simulations: torch's own where they run on fake tensors, stand-ins elsewhere.

A stand-in keeps the states of the real one and makes its temporaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from velora_torch import optimizers
from velora_torch.heads import output_heads

SMALL = 4096
"""Parameters of fewer numbers have 32-bit states in bitsandbytes' 8-bit optimizers."""
BLOCK = 256
"""Numbers of an 8-bit state that share a scale."""

Parameters = list[nn.Parameter]


class AdamW8bit(Optimizer):
    """States of bitsandbytes' ``AdamW8bit``; it updates in one kernel, without temporaries.

    The parameters don't change: this counts, and does not train.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self._codes: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make states at the first call."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self._start(parameter)
                parameter.mul_(1.0)  # in place, as the kernel does

    def _start(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        eight = parameter.numel() >= SMALL
        for name in ("state1", "state2"):
            dtype = torch.uint8 if eight else torch.float32
            state[name] = torch.zeros_like(parameter, dtype=dtype)
        if not eight:
            return
        if parameter.device not in self._codes:  # one pair of code tables for all
            new = parameter.new_zeros
            code = (new(256, dtype=torch.float32), new(256, dtype=torch.float32))
            self._codes[parameter.device] = code
        state["qmap1"], state["qmap2"] = self._codes[parameter.device]
        blocks = -(-parameter.numel() // BLOCK)
        for name in ("absmax1", "absmax2"):
            state[name] = parameter.new_zeros(blocks, dtype=torch.float32)


class GaLoreAdamW(Optimizer):
    """AdamW on gradients projected to a low rank (Zhao et al., arXiv 2403.03507).

    As ``galore_torch.GaLoreAdamW`` keeps it: moments in the type of the gradient, a projection of
    the shorter side's singular vectors. Groups with a ``rank`` are projected, others are not.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        settings = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, rank = self.state[parameter], group.get("rank")
        gradient = parameter.grad
        assert gradient is not None
        step = state["step"] = state.get("step", 0) + 1
        tall = gradient.dim() == 2 and gradient.shape[0] >= gradient.shape[1]
        if rank:
            if (step - 1) % group.get("update_proj_gap", 200) == 0:
                state["projection"] = _projection(gradient, rank, tall)
            basis = state["projection"]
            gradient = gradient @ basis.t() if tall else basis.t() @ gradient
        if step == 1:
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        update, _root = _adam(state, gradient, group, step)
        if rank:
            update = update @ basis if tall else basis @ update
            update = update * group.get("scale", 0.25)
        parameter.add_(update, alpha=-group["lr"])
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])


def _adam(
    state: dict[str, Any], gradient: Tensor, group: dict[str, Any], step: int
) -> tuple[Tensor, Tensor]:
    beta1, beta2 = group["betas"]
    state["exp_avg"].mul_(beta1).add_(gradient, alpha=1.0 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    root = state["exp_avg_sq"].sqrt().add_(group["eps"])
    update = state["exp_avg"] / root
    # The root is returned, since galore_torch holds it while it projects back.
    return update.mul_((1.0 - beta2**step) ** 0.5 / (1.0 - beta1**step)), root


def _projection(gradient: Tensor, rank: int, tall: bool) -> Tensor:
    """The first singular vectors of the shorter side, decomposed in float32.

    For a float32 gradient they are a view that holds all vectors, as in galore_torch.
    """
    left, _values, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    return (right[:rank] if tall else left[:, :rank]).to(gradient.dtype)


def sgd(parameters: Parameters) -> Optimizer:
    """torch's SGD with the kernels that it takes on a GPU."""
    return torch.optim.SGD(parameters, lr=1e-3, foreach=True)


def sgd_momentum(parameters: Parameters) -> Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, foreach=True)


def adamw(parameters: Parameters) -> Optimizer:
    """torch's AdamW with the kernels that it takes on a GPU: temporaries for all at once."""
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=True)


def adamw_fused(parameters: Parameters) -> Optimizer:
    """torch's fused AdamW, which Hugging Face's Trainer takes."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def adamw_8bit(parameters: Parameters) -> Optimizer:
    """bitsandbytes' 8-bit AdamW."""
    _vouch()
    return AdamW8bit(parameters)


def galore_adamw(parameters: Parameters, rank: int = 128) -> Optimizer:
    """GaLore on every matrix; see :func:`make_optimizer` for the layers that it is meant for."""
    _vouch()
    matrices = [p for p in parameters if p.dim() == 2]
    others = [p for p in parameters if p.dim() != 2]
    return _galore(others, matrices, rank)


OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
    "adamw": adamw,
    "adamw_fused": adamw_fused,
    "adamw_8bit": adamw_8bit,
    "galore_adamw": galore_adamw,
}
"""Optimizers of a list of parameters by name."""


def make_optimizer(name: str, model: nn.Module, rank: int = 128) -> Optimizer:
    """An optimizer of a model's trainable parameters.

    Args:
        name: one of ``OPTIMIZERS``.
        model: GaLore projects the weights of its linear layers, the output head excluded.
        rank: GaLore's.

    Raises:
        ValueError: no such optimizer, or nothing to train.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer {name!r}; there are: {', '.join(OPTIMIZERS)}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient: add an adapter to "
            f"it, or unfreeze what should train"
        )
    if name != "galore_adamw":
        return OPTIMIZERS[name](parameters)
    _vouch()
    heads = {id(head) for head in output_heads(model) if head is not None}
    weights = {
        id(module._parameters["weight"])
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module) not in heads
    }
    projected = [p for p in parameters if id(p) in weights]
    return _galore([p for p in parameters if id(p) not in weights], projected, rank)


def _galore(others: Parameters, projected: Parameters, rank: int) -> Optimizer:
    groups: list[dict[str, Any]] = [{"params": others}, {"params": projected, "rank": rank}]
    return GaLoreAdamW([group for group in groups if group["params"]])


@cache
def _vouch() -> None:
    """Coefficients are elementwise to these, where no rank is set."""
    optimizers.register(AdamW8bit, optimizers.Rule("sign"))
    optimizers.register(GaLoreAdamW, optimizers.LOW_RANK)
