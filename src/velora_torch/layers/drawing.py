"""When a layer chooses its vectors, and from what.

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from velora_torch import ranks
from velora_torch.config import RANDOM, VeloraConfig
from velora_torch.layers.tensor_parallel import localise
from velora_torch.layers.updates import FoldedUpdates
from velora_torch.subtoken import vectors as choose


class DrawnVectors(FoldedUpdates):
    """The part of a compressed layer that chooses vectors."""

    @property
    @abstractmethod
    def features(self) -> int:
        """D."""

    @property
    def shared(self) -> bool:
        """Whether all groups have the same vector."""
        return self.velora.config.vectors == "shared"

    def choose(self, x: Tensor) -> None:
        """Draw from the input of a training forward, or leave it to what all ranks know."""
        state = self.velora
        if ranks.choosing() and state.config.init not in RANDOM:
            x_TD, dtype = x.detach().reshape(-1, self.features), self.velora_vectors.dtype
            groups = state.groups if self.shared else 1
            if not ranks.offer(state.name, x_TD, state.config.init, groups, dtype):
                self.draw(None)
        else:
            self.draw(x)

    @torch.no_grad()
    def draw(self, x: Tensor | None) -> None:
        """Choose vectors: from the input x (..., D), or random ones without it.

        Only when no coefficients are pending; the turn from old to new vectors is kept, and
        applied to the optimizer's first moments before its next step.
        """
        state, config = self.velora, self.velora.config
        localise(self)
        if state.pending:
            self.collect()
        if state.pending and self._is_gathered():
            raise RuntimeError(
                f"VeLoRA: the coefficients of layer {state.name!r} were changed without an "
                f"optimizer's step, and new vectors are due: call velora_torch.fold(model) after "
                f"such changes where parameters are sharded"
            )
        if state.pending and state.frozen:  # the base stays, and so do the vectors
            state.due = False
            return
        if state.pending:
            self.fold()
        old = self.velora_vectors
        mask = choose.feature_mask(state.groups, state.size, self.features, old.device)
        if config.init in RANDOM or x is None:
            raw = random_vectors(state.name, state.draws, config, old)
        else:
            x_TD = x.detach().reshape(-1, self.features)
            raw, self.velora_running = vectors_from(x_TD, mask, config, old, self.velora_running)
        new, valid = choose.normalise(raw, mask, old)
        if state.steps:
            self.velora_turn = choose.cosine(old, new)
            self.velora_sign_turn = choose.sign_cosine(old, new)
        if state.folds:
            state.lost = "its vectors were redrawn after coefficients had been folded"
        if not state.drawn and x is not None:
            self._unchecked = valid
        self.velora_vectors = new
        state.drawn, state.due, state.draws = True, False, state.draws + 1

    def take_unchecked(self) -> Tensor | None:
        """Whether the first draw from data found a direction (0-d boolean), once."""
        unchecked, self._unchecked = self._unchecked, None
        return unchecked

    def needs_data(self) -> bool:
        """Whether the next training forward is to choose vectors from its input."""
        state, coef = self.velora, self._parameters["coef"]
        trained = self.raw_weight if coef is None else coef
        return (
            state.due
            and self.training
            and trained.requires_grad
            and state.config.init not in RANDOM
        )

    def draw_again(self) -> None:
        """Forget the first draw: the next training forward chooses vectors."""
        self.velora.drawn, self.velora.due = False, True


def random_vectors(name: str, draws: int, config: VeloraConfig, old_GM: Tensor) -> Tensor:
    """Random directions (G, M), the same on every rank; see :func:`choose.random`.

    Where the configuration chooses from data and there are none, they are Gaussian.
    """
    groups, size = old_GM.shape
    per_group = config.vectors == "per_group"
    shape, dtype = (groups, size), old_GM.dtype
    raw = choose.random(name, config.seed, draws, shape, per_group, dtype, config.init)
    return raw.to(old_GM.device)


def vectors_from(
    x_TD: Tensor, mask_GM: Tensor, config: VeloraConfig, old_GM: Tensor, running_GM: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Directions (G, M) from tokens, and the running average as it is then (None without one)."""
    groups, size = old_GM.shape
    per_group = config.vectors == "per_group"
    if config.init == "svd":
        return choose.singular(x_TD, groups, size, per_group, old_GM.dtype), running_GM
    raw = choose.mean_sub_token(x_TD, groups, size, old_GM.dtype)
    if not per_group:
        raw = choose.share(raw, mask_GM)
    if config.init != "running_average":
        return raw, running_GM
    past, moved = running_GM, raw
    if past is None:
        past = torch.zeros_like(raw)
    else:
        moved = config.running_decay * past + (1 - config.running_decay) * raw
    raw = torch.where(torch.isfinite(raw).all(), moved, past)
    return raw, raw
