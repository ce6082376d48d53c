"""How an optimizer's update of the coefficients reaches the weight: at once, later, or never.

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from velora_torch.config import RANDOM
from velora_torch.integrations.deepspeed import clear_master
from velora_torch.layers.watching import WatchedCoefficients
from velora_torch.sharding import Block, as_sharded, block_of, is_sharded, like, local, rows_of
from velora_torch.subtoken import vectors as choose
from velora_torch.subtoken.factored import expand
from velora_torch.subtoken.folding import fold_


class FoldedUpdates(WatchedCoefficients):
    """The part of a compressed layer that folds coefficients into the weight."""

    transposed: bool
    """Whether the weight is stored as (D, O)."""

    @abstractmethod
    def draw(self, x: Tensor | None) -> None:
        """Choose vectors."""

    @property
    def weight_OD(self) -> Tensor:
        """The weight as (O, D), a view; of a sharded weight this rank's block."""
        weight = local(self.raw_weight.detach())
        return weight.t() if self.transposed else weight

    @property
    def block(self) -> Block:
        """Where :attr:`weight_OD` lies in the whole weight."""
        block = block_of(self.raw_weight.detach())
        return block.transposed if self.transposed else block

    @property
    def direction_GM(self) -> Tensor:
        """e: what the coefficients multiply when they are folded, (G, M)."""
        v = self.velora_vectors
        return v.sign() if self.velora.direction == "sign" else v

    def after_step(self, direction: str, decay: float | Tensor = 1.0) -> None:
        """An optimizer has changed ``coef``: fold it, or keep it pending.

        Args:
            direction: ``v`` or ``sign``, by the optimizer's rule.
            decay: 1 - lr * weight_decay, for the weight.
        """
        state, config = self.velora, self.velora.config
        state.steps += 1
        self._mark = None
        refresh = config.refresh_every is not None and state.steps % config.refresh_every == 0
        redraw = refresh or config.init in ("running_average", "batch_average")
        if self._parameters["coef"] is not None:
            state.direction = direction
            state.pending = True
            every = config.fold_every
            # New vectors may only be drawn after a fold.
            if every is not None and (state.steps % every == 0 or redraw or state.due):
                self.fold(decay)
            else:
                if not state.frozen:  # else the coefficients alone decay, as a LoRA adapter does
                    self._decay(decay)
                self._note_seen()
        if redraw and config.init in RANDOM:
            self.draw(None)
        elif redraw:
            state.due = True

    def fold_all(self) -> None:
        """Fold whatever ``coef`` holds; does nothing where it holds nothing."""
        self.collect()
        if self.velora.pending:
            self.fold()

    def prepare_to_save(self) -> None:
        """Fold what is pending, unless the configuration never folds."""
        self.collect()
        if self.velora.pending and self.velora.config.fold_every is not None:
            self.fold()

    @torch.inference_mode(False)  # what is made here must be good for training
    @torch.no_grad()
    def fold(self, decay: float | Tensor = 1.0) -> None:
        """W <- decay * W + coef (x) e, and coef back to zero."""
        coef, state = self._parameters["coef"], self.velora
        if coef is None:
            return
        config = state.config
        seed = None
        if config.rounding == "stochastic":
            seed = choose.layer_seed(state.name, config.seed, state.folds)
        self._add(coef.detach(), decay, seed)
        state.folds += 1
        self._note_decay(decay)
        if config.track_delta:
            if self.velora_delta is None:
                self.velora_delta = torch.zeros_like(coef.detach())
                state.delta_direction = state.direction
            elif state.delta_direction != state.direction:
                state.lost = "optimizers of different kinds have trained it"
            if is_sharded(coef) and not is_sharded(self.velora_delta):  # loaded before sharding
                self.velora_delta = as_sharded(self.velora_delta, coef.detach())
            self.velora_delta.add_(coef.detach())
        coef.zero_()
        clear_master(coef)
        state.pending = False
        self._note_seen()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """A copy of the weight, as stored, with pending coefficients in it."""
        block, weight = self.block, self.weight_OD
        coef = rows_of(self.coef.detach(), block, len(weight))
        end = block.column + weight.shape[1]
        delta = expand(coef, self.direction_GM, end)[:, block.column :]
        merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
        return like(merged.t().contiguous() if self.transposed else merged, self.raw_weight)

    def _add(self, coef_OG: Tensor, decay: float | Tensor, seed: int | None) -> None:
        """``W <- decay * W + coef (x) e``, in the block that this rank holds."""
        weight, block = self.weight_OD, self.block
        rows = rows_of(coef_OG, block, len(weight))
        fold_(weight, rows, self.direction_GM, decay, seed, block)

    @torch.no_grad()
    def _decay(self, decay: float | Tensor) -> None:
        if isinstance(decay, Tensor) or decay != 1.0:
            nothing = torch.zeros_like(self.coef.detach())
            state, config = self.velora, self.velora.config
            seed = None
            if config.rounding == "stochastic":
                seed = choose.layer_seed(state.name, config.seed, -1 - state.steps)
            self._add(nothing, decay, seed)
            self._note_decay(decay)

    def _note_decay(self, decay: float | Tensor) -> None:
        if isinstance(decay, Tensor) or decay != 1.0:
            self.velora.lost = "weight decay has changed the base weight"
