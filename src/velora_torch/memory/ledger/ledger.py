"""Who keeps what for the backward pass, and what compressing some layers would really free."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from velora_torch.memory.freed import TargetWarning, disarm
from velora_torch.memory.ledger.rehearsal import FakeRehearsal, Loss, Rehearsal, check_arguments
from velora_torch.memory.ledger.saves import Holder, Saved

if TYPE_CHECKING:
    from velora_torch.config import Targets


def explain(
    model: nn.Module, batch: Any, *, loss: Loss | None = None, on: Literal["fake", "real"] = "fake"
) -> Ledger:
    """Find out which layers and operators keep which tensors for the backward pass.

    One training forward of a copy is run, in train mode; the model itself, its vectors, gradients
    and random numbers are not touched. The copy is on fake CPU tensors, which need no memory and
    no arithmetic; attention on them keeps what flash attention keeps.

    Args:
        model: any module, on any device (``meta`` too), compressed or plain.
        batch: a dict of keyword arguments for the model's forward, a tuple of positional ones, or
            one tensor. Give labels to have the loss counted.
        loss: of a model and a batch, a 0-d tensor. By default ``.loss`` of the model's output, or
            where it has none the sum of its floating-point tensors.
        on: ``"real"`` runs a real copy on the model's own device instead, for models that look at
            the numbers in their tensors.

    Raises:
        ValueError: the batch does not match the model's forward, no gradient flows, or an operator
            cannot run on fake tensors.
    """
    if on not in ("fake", "real"):
        raise ValueError(f"on must be 'fake' or 'real', got {on!r}")
    if loss is None:
        check_arguments(model, batch)
    rehearsal = (Rehearsal if on == "real" else FakeRehearsal)(model, batch, loss)
    return Ledger(rehearsal.saves(), rehearsal)


@dataclass(frozen=True)
class Ledger:
    """What is saved for the backward pass. ``print`` it for a table."""

    rows: list[Saved]
    """One for each storage, in the order in which they were saved first. Parameters and buffers of
    the model are left out."""
    _rehearsal: Rehearsal = field(repr=False, compare=False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all saved activations, each storage once."""
        return sum(row.bytes for row in self.rows)

    def by_layer_kind(self) -> dict[str, int]:
        """Bytes by class of layer, largest first. A storage counts for the first who saves it."""
        return _totals(self.rows, lambda row: row.kind)

    def by_operator(self) -> dict[str, int]:
        """Bytes by operator, largest first. A storage counts for the first who saves it."""
        return _totals(self.rows, lambda row: row.operator)

    def what_if(self, targets: Targets = "all-linear", **settings: Any) -> WhatIf:
        """What compressing layers really frees, found by compressing a copy of the model.

        Args:
            targets: which layers, as in :class:`velora_torch.VeloraConfig`.
            **settings: its other fields.

        Raises:
            ValueError: the model is compressed already, or the configuration does not fit it.
        """
        from velora_torch.config import VeloraConfig
        from velora_torch.model import compress, compressed_layers

        if compressed_layers(self._rehearsal.model):
            raise ValueError(
                "this model is compressed already: explain the plain model (before compress, or "
                "after velora_torch.restore), and ask that ledger what_if"
            )
        config = VeloraConfig(targets=targets, **settings)
        layers: list[str] = []

        def prepare(copy: nn.Module) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TargetWarning)  # it is said in the result
                layers.extend(compressed_layers(disarm(compress(copy, config))))

        after = Ledger(self._rehearsal.saves(prepare), self._rehearsal)
        useless = useless_targets(self.rows, layers)
        reasons = {name: _reason(name, others) for name, others in useless.items()}
        return WhatIf(self, after, tuple(layers), reasons)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "total_bytes": self.total_bytes,
            "by_layer_kind": self.by_layer_kind(),
            "by_operator": self.by_operator(),
            "rows": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        """A table: equal rows of repeated blocks are counted, not repeated."""
        from velora_torch.memory.ledger.table import ledger_text

        return ledger_text(self)


@dataclass(frozen=True)
class WhatIf:
    """What compressing some layers changes. ``print`` it for a summary."""

    before: Ledger
    after: Ledger
    layers: tuple[str, ...]
    """Names of the layers that were compressed."""
    useless: dict[str, str]
    """The layers whose compression frees no activation, with the reason."""

    @property
    def total_bytes(self) -> int:
        """Saved activations when the layers are compressed."""
        return self.after.total_bytes

    @property
    def added_bytes(self) -> int:
        """What the compressed layers keep instead of their inputs."""
        layers = set(self.layers)
        return sum(r.bytes for r in self.after.rows if all(h.layer in layers for h in r.holders))

    @property
    def freed_bytes(self) -> int:
        """What is no longer kept."""
        return self.before.total_bytes - self.after.total_bytes + self.added_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "total_bytes_before": self.before.total_bytes,
            "total_bytes": self.total_bytes,
            "freed_bytes": self.freed_bytes,
            "added_bytes": self.added_bytes,
            "by_layer_kind": self.after.by_layer_kind(),
            "by_operator": self.after.by_operator(),
            "layers": list(self.layers),
            "useless": dict(self.useless),
        }

    def __str__(self) -> str:
        """A summary: equal reasons of repeated blocks are counted, not repeated."""
        from velora_torch.memory.ledger.table import what_if_text

        return what_if_text(self)


def useless_targets(rows: Sequence[Saved], targets: Sequence[str]) -> dict[str, tuple[Holder, ...]]:
    """The layers among the targets whose compression frees nothing, and who else keeps their input.

    A storage is freed when all who keep it are compressed. A layer that keeps nothing at all is
    useless without anyone else.

    Args:
        rows: of the plain model.
        targets: names of the layers that are to be compressed.
    """
    chosen = set(targets)
    kept: dict[str, list[list[Holder]]] = {name: [] for name in targets}
    for row in rows:
        outside = [holder for holder in row.holders if holder.layer not in chosen]
        for name in {holder.layer for holder in row.holders} & chosen:
            kept[name].append(outside)
    return {
        name: tuple(dict.fromkeys(holder for group in others for holder in group))
        for name, others in kept.items()
        if all(others)
    }


def _reason(name: str, others: Sequence[Holder]) -> str:
    if not others:
        return "it keeps no input: this batch does not train it"
    named = ", ".join(f"{holder.name_beside(name)} ({holder.operator})" for holder in others)
    return f"its input is also kept by {named}"


def _totals(rows: list[Saved], key: Callable[[Saved], str]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for row in rows:
        totals[key(row)] += row.bytes
    return dict(totals.most_common())
