"""FLoRA: gradients and momentum in a random low-rank subspace that is drawn anew now and then.

Hao, Cao and Mou, "FLORA: Low-Rank Adapters Are Secretly Gradient Compressors" (ICML 2024,
arXiv 2402.03293), Algorithm 2, with Adafactor's factored second moment as there:

    A ~ N(0, 1/r)^{r x n}            drawn anew every κ steps, of which a seed is all that is kept
    M <- M A_old A^T                 the momentum moves to the new subspace when it is drawn
    M <- β1 M + (1 - β1) G A^T       momentum, m x r instead of m x n
    R, C <- running means of the rows and columns of G²
    W <- W - lr (M A) / sqrt(R C^T / mean(R))

Legend: m x n weight W, gradient G, r rank, κ `update_proj_gap`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from velora_torch.optimizers import LOW_RANK, register
from velora_torch.state_types import restore_types
from velora_torch.subtoken.vectors import layer_seed


class Flora(Optimizer):
    """FLoRA's momentum compression for matrices, AdamW for everything else.

    Args:
        params: parameters, or groups of them; a group with the key ``rank`` is compressed.
        lr: learning rate.
        betas: decay of the momentum and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    A group with ``rank`` may also have ``update_proj_gap`` (κ, 200 by default) and ``seed``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for number, group in enumerate(self.param_groups):
            rank = group.get("rank")
            if rank is not None and rank < 1:
                raise ValueError(f"rank must be at least 1, got {rank}")
            group.setdefault("update_proj_gap", 200)
            group.setdefault("seed", number)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state, in float32 where torch would give it the type of the weights."""
        super().load_state_dict(copy.deepcopy(state_dict))
        restore_types(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for place, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                compressed = group.get("rank") is not None and p.ndim == 2
                move = self._compressed(p, group, place) if compressed else self._adam(p, group)
                p.sub_((group["lr"] * move).to(p.dtype))
        return loss

    def _compressed(self, p: Tensor, group: dict[str, Any], place: int) -> Tensor:
        """The direction of a compressed matrix, (m, n), in float32."""
        (beta1, beta2), state, grad_mn = group["betas"], self.state[p], p.grad.float()  # type: ignore[union-attr]
        rank = min(group["rank"], p.shape[1])
        if not state:
            state["step"] = 0
            state["momentum"] = grad_mn.new_zeros(p.shape[0], rank)
            state["rows"] = grad_mn.new_zeros(p.shape[0])
            state["columns"] = grad_mn.new_zeros(p.shape[1])
        drawn, step = divmod(state["step"], group["update_proj_gap"])
        proj_rn = self._projection(p, rank, layer_seed(f"flora {place}", group["seed"], drawn))
        if step == 0 and drawn:
            former = layer_seed(f"flora {place}", group["seed"], drawn - 1)
            former_rn = self._projection(p, rank, former)
            state["momentum"].copy_(state["momentum"] @ former_rn @ proj_rn.T)
        state["step"] += 1
        state["momentum"].lerp_(grad_mn @ proj_rn.T, 1 - beta1)
        square_mn = grad_mn.square()
        state["rows"].lerp_(square_mn.mean(1), 1 - beta2)
        state["columns"].lerp_(square_mn.mean(0), 1 - beta2)
        seen1, seen2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        rows_m, columns_n = state["rows"] / seen2, state["columns"] / seen2
        second_mn = torch.outer(rows_m, columns_n) / rows_m.mean().clamp(min=1e-30)
        return (state["momentum"] @ proj_rn) / seen1 / (second_mn.sqrt() + group["eps"])

    def _adam(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """AdamW's direction."""
        (beta1, beta2), state, grad = group["betas"], self.state[p], p.grad.float()  # type: ignore[union-attr]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
        seen1, seen2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        return state["exp_avg"] / seen1 / ((state["exp_avg_sq"] / seen2).sqrt() + group["eps"])

    @staticmethod
    def _projection(p: Tensor, rank: int, seed: int) -> Tensor:
        """A of shape (r, n), from a seed alone."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(rank, p.shape[1], generator=generator)
        return draw.to(p.device) / rank**0.5


register(Flora, LOW_RANK)
