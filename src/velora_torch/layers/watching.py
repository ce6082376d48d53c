"""Which changes of a layer's coefficients are known, and which are not folded yet.

``coef`` belongs to its layer as a tensor of a certain identity and version. Noticed here are those
who change it without a watched optimizer step (``coef.data``, a kernel of another library, SAM), or
put another tensor in its place for a while (``torch.func.functional_call``, FSDP).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from velora_torch.integrations.deepspeed import notice, takes_gradients
from velora_torch.layers.protocol import PlainOutside
from velora_torch.layers.tensor_parallel import localise, shards
from velora_torch.sharding import is_sharded
from velora_torch.values import has_values

if TYPE_CHECKING:
    from velora_torch.layers.base import CompressedLayer

LIVE: weakref.WeakSet[CompressedLayer] = weakref.WeakSet()
"""Every compressed layer alive: how an optimizer's step finds the layers it has trained."""


class WatchedCoefficients(PlainOutside):
    """The part of a compressed layer that knows its coefficients."""

    _shard: tuple[int, int, int]
    """Identity, version and dimensions of sharded coefficients, when they were last known."""

    def _version_now(self) -> int:
        coef = self._parameters["coef"]
        return -1 if coef is None else coef._version

    def adopt_coef(self) -> None:
        """Take ``coef`` as it is now for known, and watch its gradient."""
        coef = self._parameters["coef"]
        is_new = id(coef) != self.__dict__.get("_own")
        self._note_seen()
        self._mark: tuple[int, int] | None = None
        LIVE.add(cast("CompressedLayer", self))
        if is_new and coef is not None:
            this, trains = weakref.ref(self), coef.requires_grad

            def accumulated(parameter: Tensor) -> None:
                notice()
                layer, grad = this(), parameter.grad
                if layer is not None and grad is not None:
                    layer._mark = (id(grad), grad._version)

            coef.requires_grad_(True)  # hooks can be registered on no other; it may train later
            coef.register_post_accumulate_grad_hook(accumulated)
            coef.requires_grad_(trains)

    def _note_seen(self) -> None:
        coef = self._parameters["coef"]
        self._own, self._seen = id(coef), self._version_now()
        if is_sharded(coef) and not self._is_gathered():
            self._shard = (self._own, self._seen, shards(coef))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module; tensor parallel puts its parts in the place of whole ones."""
        super().register_parameter(name, param)
        if name == "coef" and "_own" in self.__dict__:
            self.adopt_coef()

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; FSDP puts whole parameters in the place of sharded ones, and back.

        Both are the layer's own then, unlike the tensors of ``torch.func.functional_call``.
        """
        parameters = self.__dict__.get("_parameters", {})
        former = parameters.get(name) if isinstance(value, nn.Parameter) else None
        if former is None:
            super().__setattr__(name, value)
            return
        moves = name == "coef" and (is_sharded(value) or is_sharded(former))
        if moves and "_own" in self.__dict__:
            changed = id(former) == self._own and former._version != self._seen
            if is_sharded(value) and self.__dict__.get("_shard", (0,))[0] == id(value):
                changed = changed or value._version != self._shard[1]
            self.velora.pending = self.velora.pending or changed
        self._parameters[name] = value
        if moves:
            self._mark = None
            self._note_seen()

    def _is_gathered(self) -> bool:
        """Whether FSDP has put whole parameters in the place of sharded ones for now."""
        home = self.__dict__.get("_shard")
        return home is not None and shards(self._parameters["coef"]) < home[2]

    def _gradient_was_used(self) -> bool:
        """Whether a gradient that autograd left in ``coef`` is gone or changed since.

        Then something may have trained ``coef`` in a way that torch does not count as a change
        (writes to ``coef.data``, kernels of other libraries).
        """
        if self._mark is None or takes_gradients(self.coef):
            return False
        grad = self.coef.grad
        return grad is None or (id(grad), grad._version) != self._mark

    def _substituted(self) -> bool:
        """Whether ``coef`` is for now another tensor, as in ``torch.func.functional_call``."""
        return not torch.compiler.is_compiling() and id(self._parameters["coef"]) != self._own

    def settle(self) -> None:
        """Notice coefficients that may have changed without a watched optimizer step.

        They are pending from then on: every forward adds them, and they are folded at the next
        watched step, or when the weight is read, saved or restored. Not at once, since who
        perturbs parameters for one forward (SAM) takes the change back.
        """
        localise(self)
        weight = self.raw_weight
        trains = self._parameters["coef"] is not None and weight.requires_grad
        if trains and isinstance(weight, nn.Parameter):
            # PEFT makes all parameters of an adapter that becomes active trainable.
            weight.requires_grad_(False)
        changed = self._version_now() != self._seen or self._substituted()
        if changed or self._gradient_was_used():
            self.velora.pending = True
            self._mark = None
            self._note_seen()

    def collect(self) -> None:
        """Notice every change of ``coef``, however it was made: looks at its values."""
        coef = self._parameters["coef"]
        if coef is None:
            return
        self.settle()
        if has_values(coef) and not is_sharded(coef):  # ranks with other shards see other values
            self.velora.pending = bool(coef.detach().any())
