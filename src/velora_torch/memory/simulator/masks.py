"""What transformers learns of a batch by looking at its numbers, for batches that have none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from velora_torch.values import has_values


@dataclass
class Rows:
    """What the rows of a batch hold. Ordinary ones hold one sequence each and no padding."""

    packed: bool = False
    """Some row holds several sequences."""
    padded: bool = False
    """Some row is shorter than others."""

    def look(self, batch: Any) -> None:
        """Find out from a batch's numbers; where it has none, expect the worst."""
        if not isinstance(batch, dict):
            return
        positions, mask = batch.get("position_ids"), batch.get("attention_mask")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            self.packed = not has_values(positions) or bool((positions.diff(dim=-1) != 1).any())
        if isinstance(mask, Tensor):
            self.padded = not has_values(mask) or not bool(mask.bool().all())

    @contextmanager
    def known(self) -> Iterator[None]:
        """Tell transformers, which of fake numbers always expects the worst.

        That is a mask that every layer keeps, and key-value heads repeated for each query head.
        """
        masking: Any = sys.modules.get("transformers.masking_utils")
        with ExitStack() as patches:
            if masking is not None and not self.packed:
                patches.enter_context(
                    _replaced(masking, "find_packed_sequence_indices", _one_sequence(masking))
                )
            if masking is not None and not self.padded:
                for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
                    unpadded = _without_mask(getattr(masking, name))
                    patches.enter_context(_replaced(masking, name, unpadded))
            yield


def _one_sequence(masking: Any) -> Any:
    find = masking.find_packed_sequence_indices

    def none(position_ids: Tensor) -> Tensor | None:
        """Everything up to the look at the numbers, whose temporaries count too."""
        with _replaced(masking, "is_tracing", lambda tensor=None: False):
            try:
                found: Tensor | None = find(position_ids)
            except DataDependentOutputException:
                return None
            return found

    return none


def _without_mask(ignore: Any) -> Any:
    def unpadded(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        return bool(ignore(None, *args, **kwargs))

    return unpadded


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    former = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, former)
