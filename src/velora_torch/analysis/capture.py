"""Inputs and output gradients of a model's layers, taken from the training steps themselves.

Hooks on the layers see every training pass. They keep a seeded sample of the tokens, copied once:
layers that share an input share its sample. A layer is handed over, and forgotten, as soon as the
backward pass has come through it.

Shapes: T tokens of a batch (all leading dimensions together) or of a sample, D input features,
O output features.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.subtoken.vectors import layer_seed


@dataclass(frozen=True)
class Captured:
    """What one layer has done in one training step, on a sample of the tokens; on the CPU."""

    name: str
    x_TD: Tensor
    """Input, in the model's type."""
    dY_TO: Tensor
    """Gradient of the loss with respect to the output, for the same tokens."""
    tokens: int
    """Tokens that the layer has seen in this step."""


@dataclass(eq=False)
class _Call:
    """A forward pass of a layer that waits for its gradient."""

    x_TD: Tensor
    index_T: Tensor
    dY_TO: Tensor | None = None


@dataclass
class _Layer:
    """What has been taken of a layer in this step."""

    calls: list[_Call] = field(default_factory=list)
    tokens: int = 0
    taken: int = 0
    waiting: int = 0


class Capture:
    """Takes samples of layers while a model trains; a context, since it hangs hooks on them.

    Args:
        model: its forward passes are counted.
        layers: modules that multiply their input by a matrix, by name.
        tokens: the most that are sampled from each layer in one step. A layer that is called
            more than once in a pass gives tokens of its first calls.
        seed: of the samples.
        on_mean: called with a layer's name and its mean token (D,) over the whole first batch of
            each step, before its samples are handed over.
        on_sample: called with what was taken of a layer, in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        tokens: int,
        seed: int,
        on_mean: Callable[[str, Tensor], None],
        on_sample: Callable[[Captured], None],
    ) -> None:
        self._tokens, self._seed = tokens, seed
        self._on_mean, self._on_sample = on_mean, on_sample
        self._step, self._passes, self._pass = -1, 1, 0
        self._watching = self._sampling = False
        self._found: dict[str, _Layer] = {}
        self._mean_of: set[str] = set()
        self._last: tuple[weakref.ref[Tensor], int, Tensor, Tensor] | None = None
        self._handles = [model.register_forward_pre_hook(self._pass_begins)]
        for name, module in layers.items():
            hook = partial(self._called, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._forget()

    def begin(self, step: int, passes: int, sample: bool) -> None:
        """A training step begins.

        Args:
            step: its number, which the sample depends on.
            passes: forward passes whose gradients are added up in it.
            sample: whether to take samples; means are taken in every step.
        """
        self._forget()
        self._step, self._passes = step, passes
        self._watching, self._sampling = True, sample

    def finish(self) -> None:
        """The step's backward passes are over: hand over what has not been handed over yet."""
        for name in list(self._found):
            self._deliver(name)
        self._forget()

    def _forget(self) -> None:
        self._watching = self._sampling = False
        self._pass, self._last = 0, None
        self._found, self._mean_of = {}, set()

    # ------------------------------------------------------------------ hooks

    def _pass_begins(self, module: nn.Module, args: Any) -> None:
        self._pass += 1
        self._last = None

    def _called(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not (self._watching and output.requires_grad):  # an evaluation, say
            return
        x = args[0] if args else next(iter(kwargs.values()))
        if x.numel() == 0:  # an expert without tokens
            return
        x_TD = x.detach().reshape(-1, x.shape[-1])
        if name not in self._mean_of:
            self._mean_of.add(name)
            wide = torch.promote_types(x.dtype, torch.float32)
            self._on_mean(name, x_TD.mean(dim=0, dtype=wide).cpu())
        if self._sampling:
            self._take(name, x, x_TD, output)

    def _take(self, name: str, x: Tensor, x_TD: Tensor, output: Tensor) -> None:
        layer = self._found.setdefault(name, _Layer())
        layer.tokens += len(x_TD)
        # What earlier passes have left of their share is there for this one.
        room = -(-self._tokens * self._pass // self._passes) - layer.taken
        count = min(len(x_TD), room)
        if count <= 0:
            return
        call = _Call(*self._sample(x, x_TD, count))
        layer.calls.append(call)
        layer.taken += count
        layer.waiting += 1
        output.register_hook(partial(self._gradient, name, call))

    def _sample(self, x: Tensor, x_TD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Rows of an input and their places; those of the layer before, if it had the same."""
        if self._last is not None:
            former, version, rows, index = self._last
            if former() is x and version == x._version and len(index) == count:
                return rows, index
        where = f"tokens of step {self._step}, pass {self._pass}"
        generator = torch.Generator().manual_seed(layer_seed(where, self._seed, len(x_TD)))
        index = torch.randperm(len(x_TD), generator=generator)[:count].sort().values
        rows = x_TD.index_select(0, index.to(x.device)).cpu()
        self._last = (weakref.ref(x), x._version, rows, index)
        return rows, index

    def _gradient(self, name: str, call: _Call, grad: Tensor) -> None:
        layer = self._found.get(name)
        if layer is None or call.dY_TO is not None or call not in layer.calls:
            return
        dY_TO = grad.detach().reshape(-1, grad.shape[-1])
        call.dY_TO = dY_TO.index_select(0, call.index_T.to(grad.device)).cpu()
        layer.waiting -= 1
        if layer.waiting == 0 and self._pass == self._passes:
            self._deliver(name)

    def _deliver(self, name: str) -> None:
        layer = self._found.pop(name)
        known = [(call.x_TD, call.dY_TO) for call in layer.calls if call.dY_TO is not None]
        if known:
            xs, dYs = zip(*known, strict=True)
            self._on_sample(Captured(name, _joined(xs), _joined(dYs), layer.tokens))


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
