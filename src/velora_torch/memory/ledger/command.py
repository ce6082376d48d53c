"""What `velora explain` shows: the ledger of a named model, and what compression would change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from velora_torch.config import VeloraConfig
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.ledger.ledger import Ledger, WhatIf, explain
from velora_torch.memory.simulator.architecture import resolve
from velora_torch.memory.simulator.setup import dtype_named
from velora_torch.selection import select


@dataclass(frozen=True)
class Explained:
    """The two answers of the command."""

    title: str
    ledger: Ledger
    what_if: WhatIf

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "title": self.title,
            **self.ledger.to_dict(),
            "what_if": self.what_if.to_dict(),
        }

    def __str__(self) -> str:
        """Both as text."""
        return f"{self.title}\n{self.ledger}\n\n{self.what_if}"


def explain_named(
    model: str, batch: int, seq: int | None, dtype: str, config: VeloraConfig
) -> Explained:
    """Explain a model that is known by name or configuration; no weights are loaded.

    Args:
        model: what :func:`velora_torch.memory.simulator.architecture.resolve` takes.
        batch: sequences or images.
        seq: tokens of a sequence; ``None`` for the model's own.
        dtype: type of the weights, such as ``bfloat16``.
        config: what compression to ask about.

    Raises:
        ValueError: an unknown model, type or layer, or a size that does not fit the model.
    """
    kind = dtype_named(dtype)
    architecture = resolve(model)
    world = FakeWorld()
    built = architecture.build(world, kind)
    select(built, config)  # a wrong layer name is found before the model is run
    inputs = architecture.batch(world, batch, seq)
    ledger = explain(built, inputs)
    tokens = inputs.get("input_ids")
    size = f"batch {batch}" + (f" x {tokens.shape[1]} tokens" if tokens is not None else "")
    return Explained(
        f"{architecture.name}, {size}, {dtype}",
        ledger,
        ledger.what_if(**{name: getattr(config, name) for name in _FIELDS}),
    )


_FIELDS = ("targets", "num_groups", "sub_token_size")
