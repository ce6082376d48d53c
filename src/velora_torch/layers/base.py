"""What every compressed layer is: a plain layer plus coefficients, vectors and a few counters.

Compressing changes the *class* of a module in place (as ``nn.utils.parametrize`` does), so its
name, hooks, parameters and ``state_dict`` keys stay what they were. The weight is frozen; the
trainable parameter is ``coef`` (O x G, zero after every fold).

Its parts, each on top of the former: `protocol` (what `nn.Module` calls), `watching` (changes of
the coefficients), `updates` (folds), `drawing` (vectors), and here the forward.

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from velora_torch.config import RANDOM, VeloraConfig
from velora_torch.layers.drawing import DrawnVectors
from velora_torch.layers.protocol import PROCESS
from velora_torch.layers.state import TENSORS, LayerState
from velora_torch.layers.tensor_parallel import all_features, is_partitioning, parts_of
from velora_torch.layers.watching import LIVE
from velora_torch.recomputation.deferred import plain
from velora_torch.sharding import is_sharded
from velora_torch.subtoken import vectors as choose
from velora_torch.subtoken.factored import (
    ExposedWeight,
    apply_linear,
    factored_linear,
    project,
    project_to_save,
)
from velora_torch.values import is_identity


class CompressedLayer(DrawnVectors):
    """Mixed in before the class of a plain layer; see :func:`velora_torch.compress`."""

    factors = True
    """Whether coefficients can stand for the weight's change; if not, the weight itself trains."""
    foldable = True
    """Whether coefficients can be folded into the weight."""

    # ------------------------------------------------------------------ making and unmaking

    def start(self, name: str, groups: int, size: int, config: VeloraConfig) -> None:
        """Turn from a plain layer, whose class has just been changed, into a compressed one."""
        weight = self.raw_weight
        state = LayerState(name, groups, size, config, frozen=not weight.requires_grad)
        wide = torch.promote_types(weight.dtype, torch.float32)
        mask = choose.feature_mask(groups, size, self.features, weight.device)
        self.velora = state
        self._unchecked: Tensor | None = None
        for tensor in TENSORS:
            self.register_buffer(f"velora_{tensor}", None, persistent=False)
        self.velora_vectors = choose.uniform(mask, wide)
        if config.gradient == "factored" and self.factors:
            coef = torch.zeros(self.outputs, groups, dtype=wide, device=weight.device)
            self.coef = nn.Parameter(coef)
            weight.requires_grad_(False)
            weight.grad = None
        else:
            self.register_parameter("coef", None)
        if config.init in RANDOM:
            self.draw(None)
        self.adopt_coef()

    def stop(self) -> None:
        """Become the plain layer again. The caller has folded and changes the class back."""
        coef = self._parameters.pop("coef")
        if coef is not None and not self.velora.frozen:
            self.raw_weight.requires_grad_(coef.requires_grad)
        for tensor in TENSORS:
            del self._buffers[f"velora_{tensor}"]
            self._non_persistent_buffers_set.discard(f"velora_{tensor}")
        LIVE.discard(self)
        for attribute in ("velora", "_unchecked", *PROCESS):
            self.__dict__.pop(attribute, None)

    # ------------------------------------------------------------------ shapes and the weight

    @property
    def raw_weight(self) -> nn.Parameter:
        """The weight parameter itself, as stored."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def outputs(self) -> int:
        """O."""
        return self.raw_weight.shape[1 if self.transposed else 0]

    @property
    def features(self) -> int:
        """D."""
        return self.raw_weight.shape[0 if self.transposed else 1]

    @property
    def weight(self) -> Tensor:
        """The weight with all updates in it.

        Where autograd is on, an alias (a copy while coefficients are pending) that trains the
        coefficients, so that code that uses the weight outside the layer's forward is never
        silently untrained. Elsewhere the weight's own memory, so that it can be changed in place.
        """
        coef = self._parameters["coef"]
        trained = coef is not None and coef.requires_grad
        trains = trained and torch.is_grad_enabled()
        if not (self._substituted() or torch.compiler.is_compiling()):
            self.settle()
            folds = self.velora.config.fold_every is not None
            if self.velora.pending and folds and not (trains or self._is_gathered()):
                self.fold_all()
        if is_sharded(self.raw_weight):  # whoever moves and gathers shards wants them as they are
            return self.raw_weight
        if trains and not torch.compiler.is_compiling() and is_partitioning():
            self.fold_all()
            return self.raw_weight
        pending = self.velora.pending or self._substituted()
        weight = self.merged_weight() if pending else self.raw_weight
        if coef is None or not trains:
            if trained and not torch.compiler.is_compiling():
                # Matrix products of torch take another path, to other bits, with a frozen weight.
                return nn.Parameter(weight.detach())
            return weight
        return ExposedWeight.apply(weight, coef, self, self.velora.config.scale, self.transposed)

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        """``y = x Wᵀ + b``, keeping z = x v (T x G) for the backward pass instead of x."""
        bias: Tensor | None = self._parameters["bias"]
        if bias is not None and bias.dtype != self.raw_weight.dtype:  # widened for FSDP2
            bias = bias.to(self.raw_weight.dtype)
        return self.product(x, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same, with any b."""
        x = plain(x)  # the result of an activation may be deferred
        state, coef, weight = self.velora, self._parameters["coef"], self.raw_weight
        tokens, parts = x, parts_of(self, x, bias)
        substituted = self._substituted()
        functional = substituted or _in_transform()
        if functional:
            self._check_functional()
        if not (substituted or torch.compiler.is_compiling()):
            self.settle()
        trained = weight if coef is None else coef
        trains = torch.is_grad_enabled() and trained.requires_grad
        draws = trains and state.due and self.training and x.numel() > 0 and not functional
        # DoRA calls lora_A on the identity too, for the norm of the weight: those are no tokens.
        no_tokens = draws and is_identity(x)
        if draws and not no_tokens:
            self.choose(all_features(tokens))
        v, e = self.velora_vectors, self.direction_GM if state.pending or substituted else None
        if parts is None:
            return self._product(x, weight, bias, coef, v, e, no_tokens)
        e = None if e is None else e[parts.groups]
        y = self._product(
            parts.x, parts.weight, parts.bias, parts.coef, v[parts.groups], e, no_tokens
        )
        return parts.joined(y)

    def _product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        coef: Tensor | None,
        v: Tensor,
        e: Tensor | None,
        no_tokens: bool,
    ) -> Tensor:
        """The product with the tensors that this process has."""
        state = self.velora
        trained = weight if coef is None else coef
        trains = torch.is_grad_enabled() and trained.requires_grad
        if not trains:
            y = apply_linear(x, weight, bias, self.transposed)
            if e is None or coef is None:
                return y
            pending = F.linear(project(x, e, self.shared), coef.to(x.dtype))
            return y + pending.view(y.shape).to(y.dtype)
        z = None
        if state.drawn or no_tokens or x.numel() == 0:  # checkpointing must save the same again
            z = project_to_save(x, v, self.shared, _compute_dtype(x))
        dense = v if coef is None else None
        return factored_linear(
            x, weight, bias, coef, z, dense, e, state.config.scale, self.transposed, state.name
        )

    def _check_functional(self) -> None:
        if not self.velora.drawn:
            raise RuntimeError(
                f"VeLoRA: layer {self.velora.name!r} was called through torch.func before it has "
                f"vectors, and a functional call cannot choose them. Run one training forward of "
                f"the model first."
            )
        weight, factored = self.raw_weight, self._parameters["coef"] is not None
        if factored and weight.requires_grad and not isinstance(weight, nn.Parameter):
            raise RuntimeError(
                f"VeLoRA: the weight of layer {self.velora.name!r} is frozen and trained by its "
                f"coefficients, so a functional gradient in it would be missing. Differentiate "
                f"only parameters with requires_grad."
            )


def _in_transform() -> bool:
    """Whether a ``torch.func`` transform is running: tensors may not outlive it."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which a linear layer computes for x, autocast included."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return x.dtype
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
