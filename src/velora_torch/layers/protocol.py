"""To the outside, a compressed layer is the plain module: moved, saved, loaded, copied like it."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.layers.state import LayerState

PROCESS = ("_seen", "_own", "_mark", "_shard")
"""Attributes that mean nothing in a copy: identities and version counters."""


class PlainOutside(nn.Module):
    """The part of a compressed layer that `nn.Module` itself calls."""

    coef: nn.Parameter
    plain_class: type[nn.Module]
    velora: LayerState
    velora_vectors: Tensor
    """(G, M)."""
    velora_delta: Tensor | None
    velora_running: Tensor | None
    velora_turn: Tensor | None
    velora_sign_turn: Tensor | None
    _unchecked: Tensor | None
    """Whether the first draw from data found a direction (0-d boolean), not looked at yet."""

    @property
    @abstractmethod
    def raw_weight(self) -> nn.Parameter:
        """The weight parameter itself."""

    @abstractmethod
    def collect(self) -> None:
        """Notice every change of ``coef``, however it was made."""

    @abstractmethod
    def prepare_to_save(self) -> None:
        """Fold what is pending, unless the configuration never folds."""

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """A copy of the weight with pending coefficients in it."""

    @abstractmethod
    def adopt_coef(self) -> None:
        """Take ``coef`` as it is now for known, and watch its gradient."""

    def _apply(self, fn: Any, recurse: bool = True) -> PlainOutside:
        """Move with the model, but keep vectors and coefficients in float32 or wider."""
        self.collect()
        kept = {name: b for name, b in self._buffers.items() if name.startswith("velora_")}
        coef = self._parameters["coef"]
        kept_coef = None if coef is None else coef.detach()
        super()._apply(fn, recurse)
        wide = torch.promote_types(self.raw_weight.dtype, torch.float32)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != wide:
                self._buffers[name] = before.to(after.device, wide)
        after_coef = self._parameters["coef"]
        if kept_coef is not None and after_coef is not None and after_coef.dtype != wide:
            after_coef.data = kept_coef.to(after_coef.device, wide)
            if after_coef.grad is not None:
                after_coef.grad = after_coef.grad.to(wide)
        self.adopt_coef()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.prepare_to_save()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}coef", None)
        if self.velora.pending:
            self._save_pending(destination, prefix)

    def _save_pending(self, destination: Any, prefix: str) -> None:
        """What a plain checkpoint gets of coefficients that are not in the weight."""
        destination[f"{prefix}weight"] = self.merged_weight()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        """Load a plain checkpoint: its weight is final, so pending coefficients are dropped."""
        coef = self._parameters["coef"]
        plain = coef is not None and f"{prefix}coef" not in state_dict
        if plain and f"{prefix}weight" in state_dict:
            self._drop_pending()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if plain and f"{prefix}coef" in missing:
            missing.remove(f"{prefix}coef")

    @torch.no_grad()
    def _drop_pending(self) -> None:
        self.coef.zero_()
        self.velora.pending = False
        if self.velora.steps:
            self.velora.lost = "other weights were loaded after training had begun"
        self.adopt_coef()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class, since the compressed class is made at run time."""
        self.collect()
        state = {k: v for k, v in self.__dict__.items() if k not in PROCESS}
        return _blank, (self.plain_class, type(self).__mro__[1]), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["velora"] = copy.copy(state["velora"])
        super().__setstate__(state)
        self.adopt_coef()

    def extra_repr(self) -> str:
        """The plain layer's text, and how it is compressed."""
        state = self.velora
        return f"{super().extra_repr()}, velora: {state.groups} groups of {state.size}"


def _blank(original: type[nn.Module], kind_of_layer: Any) -> PlainOutside:
    from velora_torch.layers import compressed_class
    from velora_torch.stepping import watch

    watch()  # this may be a new process
    kind = compressed_class(original, kind_of_layer)
    return kind.__new__(kind)
