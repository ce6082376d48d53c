"""What every compressed layer is: a plain layer plus coefficients, vectors and a few counters.

Compressing changes the *class* of a module in place (as ``nn.utils.parametrize`` does), so its
name, hooks, parameters and ``state_dict`` keys stay what they were. The weight is frozen; the
trainable parameter is ``coef`` (O x G, zero after every fold).

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from velora_torch.config import VeloraConfig
from velora_torch.subtoken import vectors as choose
from velora_torch.subtoken.factored import (
    ExposedWeight,
    FactoredLinear,
    apply_linear,
    expand,
    project,
)
from velora_torch.subtoken.folding import fold_

LIVE: weakref.WeakSet[CompressedLayer] = weakref.WeakSet()
"""Every compressed layer alive: how an optimizer's step finds the layers it has trained."""

TENSORS = ("vectors", "delta", "running", "turn", "sign_turn")
"""Tensors of a compressed layer besides ``coef`` (buffers ``velora_*``, not in ``state_dict``)."""


@dataclass
class LayerState:
    """What a compressed layer remembers besides tensors. All fields are JSON values."""

    name: str
    groups: int
    size: int
    config: VeloraConfig = field(repr=False)
    drawn: bool = False
    """Vectors were chosen (by data, or at once for random ones)."""
    due: bool = True
    """The next training forward draws vectors."""
    draws: int = 0
    steps: int = 0
    """Optimizer steps since the layer was compressed."""
    folds: int = 0
    direction: str = "v"
    """What pending coefficients multiply: ``v``, or ``sign`` for scale-invariant optimizers."""
    pending: bool = False
    """``coef`` holds updates that are not in the weight yet."""
    delta_direction: str | None = None
    """The direction of the sum of all folds."""
    lost: str | None = None
    """Why that sum does not turn the first weight into the present one, if so."""

    def counters(self) -> dict[str, Any]:
        """What a checkpoint needs besides the configuration."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}


class CompressedLayer(nn.Module):
    """Mixed in before the class of a plain layer; see :func:`velora_torch.compress`."""

    transposed: bool
    plain_class: type[nn.Module]
    velora: LayerState
    velora_vectors: Tensor
    velora_delta: Tensor | None
    velora_running: Tensor | None
    velora_turn: Tensor | None
    velora_sign_turn: Tensor | None

    # ------------------------------------------------------------------ making and unmaking

    def start(self, name: str, groups: int, size: int, config: VeloraConfig) -> None:
        """Turn from a plain layer, whose class has just been changed, into a compressed one."""
        state = LayerState(name, groups, size, config)
        weight = self.raw_weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        mask = choose.feature_mask(groups, size, self.features, weight.device)
        self.velora = state
        self._unchecked: Tensor | None = None
        for tensor in TENSORS:
            self.register_buffer(f"velora_{tensor}", None, persistent=False)
        self.velora_vectors = choose.uniform(mask, wide)
        if config.gradient == "factored":
            coef = torch.zeros(self.outputs, groups, dtype=wide, device=weight.device)
            self.coef = nn.Parameter(coef)
            weight.requires_grad_(False)
            weight.grad = None
        else:
            self.register_parameter("coef", None)
        if config.init == "random":
            self.draw(None)
        self._note_seen()
        LIVE.add(self)

    def stop(self) -> None:
        """Become the plain layer again. The caller has folded and changes the class back."""
        coef = self._parameters.pop("coef")
        if coef is not None:
            self.raw_weight.requires_grad_(coef.requires_grad)
        for tensor in TENSORS:
            del self._buffers[f"velora_{tensor}"]
            self._non_persistent_buffers_set.discard(f"velora_{tensor}")
        LIVE.discard(self)
        for attribute in ("velora", "_unchecked", "_seen", "_own"):
            del self.__dict__[attribute]

    # ------------------------------------------------------------------ shapes and the weight

    @property
    def raw_weight(self) -> nn.Parameter:
        """The weight parameter itself, as stored."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight_OD(self) -> Tensor:
        """The weight as (O, D), a view."""
        weight = self.raw_weight.detach()
        return weight.t() if self.transposed else weight

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

        Where autograd is on, an alias that trains the coefficients, so that code that uses the
        weight outside the layer's forward is never silently untrained.
        """
        if not (self._substituted() or torch.compiler.is_compiling()):
            self.settle()
            if self.velora.pending and self.velora.config.fold_every is not None:
                self.fold()
        pending = self.velora.pending or self._substituted()
        weight = self.merged_weight() if pending else self.raw_weight
        coef = self._parameters["coef"]
        if coef is None or not (torch.is_grad_enabled() and coef.requires_grad):
            return weight
        return ExposedWeight.apply(weight, coef, self, self.velora.config.scale, self.transposed)

    @property
    def direction_GM(self) -> Tensor:
        """e: what the coefficients multiply when they are folded, (G, M)."""
        v = self.velora_vectors
        return v.sign() if self.velora.direction == "sign" else v

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        """``y = x Wᵀ + b``, keeping z = x v (T x G) for the backward pass instead of x."""
        state, coef, weight = self.velora, self._parameters["coef"], self.raw_weight
        substituted = self._substituted()
        functional = substituted or _in_transform()
        if functional:
            self._check_functional()
        if not (substituted or torch.compiler.is_compiling()):
            self.settle()
        bias = self._parameters["bias"]
        trained = weight if coef is None else coef
        trains = torch.is_grad_enabled() and trained.requires_grad
        if trains and state.due and self.training and x.numel() > 0 and not functional:
            self.draw(x)
        e = self.direction_GM if state.pending or substituted else None
        if not trains:
            y = apply_linear(x, weight, bias, self.transposed)
            if e is None or coef is None:
                return y
            return y + F.linear(project(x, e), coef.to(x.dtype)).view(y.shape).to(y.dtype)
        z = None
        if state.drawn or x.numel() == 0:
            z = project(x.detach(), self.velora_vectors).to(_compute_dtype(x))
        v = self.velora_vectors if coef is None else None
        return FactoredLinear.apply(
            x, weight, bias, coef, z, v, e, state.config.scale, self.transposed, state.name
        )

    # ------------------------------------------------------------------ vectors

    @torch.no_grad()
    def draw(self, x: Tensor | None) -> None:
        """Choose vectors: from the input x (..., D), or without data for random ones.

        Only when no coefficients are pending; the turn from old to new vectors is kept, and
        applied to the optimizer's first moments before its next step.
        """
        state, config = self.velora, self.velora.config
        if state.pending:
            self.fold()
        old = self.velora_vectors
        mask = choose.feature_mask(state.groups, state.size, self.features, old.device)
        per_group = config.vectors == "per_group"
        if config.init == "random":
            raw = choose.random(
                state.name,
                config.seed,
                state.draws,
                (state.groups, state.size),
                per_group,
                old.dtype,
            ).to(old.device)
        else:
            assert x is not None
            raw = self._raw_from(x.detach().reshape(-1, self.features), mask, per_group)
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

    def _raw_from(self, x_TD: Tensor, mask: Tensor, per_group: bool) -> Tensor:
        state, config = self.velora, self.velora.config
        dtype = self.velora_vectors.dtype
        if config.init == "svd":
            return choose.singular(x_TD, state.groups, state.size, per_group, dtype)
        raw = choose.mean_sub_token(x_TD, state.groups, state.size, dtype)
        if not per_group:
            raw = choose.share(raw, mask)
        if config.init == "running_average":
            past = self.velora_running
            moved = raw
            if past is None:
                past = torch.zeros_like(raw)
            else:
                moved = config.running_decay * past + (1 - config.running_decay) * raw
            raw = torch.where(torch.isfinite(raw).all(), moved, past)
            self.velora_running = raw
        return raw

    def take_unchecked(self) -> Tensor | None:
        """Whether the first draw from data found a direction (0-d boolean), once."""
        unchecked, self._unchecked = self._unchecked, None
        return unchecked

    def draw_again(self) -> None:
        """Forget the first draw: the next training forward chooses vectors."""
        self.velora.drawn, self.velora.due = False, True

    # ------------------------------------------------------------------ coefficients

    def _version_now(self) -> int:
        coef = self._parameters["coef"]
        return -1 if coef is None else coef._version

    def _note_seen(self) -> None:
        coef = self._parameters["coef"]
        self._own, self._seen = id(coef), self._version_now()

    def _substituted(self) -> bool:
        """Whether ``coef`` is for now another tensor, as in ``torch.func.functional_call``."""
        return not torch.compiler.is_compiling() and id(self._parameters["coef"]) != self._own

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

    def settle(self) -> None:
        """Notice coefficients that changed without a watched optimizer step; fold if due."""
        if self._version_now() == self._seen and not self._substituted():
            return
        with torch.inference_mode(False), torch.no_grad():
            changed = bool(self.coef.any())  # not if zeros were written, as by a broadcast
            self._note_seen()
            if changed:
                self.after_step(self.velora.direction)

    def after_step(self, direction: str, decay: float | Tensor = 1.0) -> None:
        """An optimizer has changed ``coef``: fold it, or keep it pending.

        Args:
            direction: ``v`` or ``sign``, by the optimizer's rule.
            decay: 1 - lr * weight_decay, for the weight.
        """
        state, config = self.velora, self.velora.config
        state.steps += 1
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
                self._decay(decay)
                self._note_seen()
        if redraw and config.init == "random":
            self.draw(None)
        elif redraw:
            state.due = True

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
        fold_(self.weight_OD, coef.detach(), self.direction_GM, decay, seed)
        state.folds += 1
        self._note_decay(decay)
        if config.track_delta:
            if self.velora_delta is None:
                self.velora_delta = torch.zeros_like(coef.detach())
                state.delta_direction = state.direction
            elif state.delta_direction != state.direction:
                state.lost = "optimizers of different kinds have trained it"
            self.velora_delta.add_(coef.detach())
        coef.zero_()
        state.pending = False
        self._note_seen()

    @torch.no_grad()
    def _decay(self, decay: float | Tensor) -> None:
        if isinstance(decay, Tensor) or decay != 1.0:
            nothing = torch.zeros_like(self.coef.detach())
            state, config = self.velora, self.velora.config
            seed = None
            if config.rounding == "stochastic":
                seed = choose.layer_seed(state.name, config.seed, -1 - state.steps)
            fold_(self.weight_OD, nothing, self.direction_GM, decay, seed)
            self._note_decay(decay)

    def _note_decay(self, decay: float | Tensor) -> None:
        if isinstance(decay, Tensor) or decay != 1.0:
            self.velora.lost = "weight decay has changed the base weight"

    # ------------------------------------------------------------------ module protocol

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedLayer:
        """Move with the model, but keep vectors and coefficients in float32 or wider."""
        self.settle()
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
        self._note_seen()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.settle()
        never = self.velora.config.fold_every is None
        if self.velora.pending and not never:
            self.fold()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}coef", None)
        if self.velora.pending:
            destination[f"{prefix}weight"] = self.merged_weight()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """A copy of the weight, as stored, with pending coefficients in it."""
        delta = expand(self.coef.detach(), self.direction_GM, self.features)
        merged = (self.weight_OD.to(delta.dtype) + delta).to(self.raw_weight.dtype)
        return merged.t().contiguous() if self.transposed else merged

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
        self._note_seen()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class, since the compressed class is made at run time."""
        self.settle()
        state = {k: v for k, v in self.__dict__.items() if k not in ("_seen", "_own")}
        return _blank, (self.plain_class,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["velora"] = copy.copy(state["velora"])
        super().__setstate__(state)
        self._note_seen()
        LIVE.add(self)

    def extra_repr(self) -> str:
        """The plain layer's text, and how it is compressed."""
        state = self.velora
        return f"{super().extra_repr()}, velora: {state.groups} groups of {state.size}"


def _blank(original: type[nn.Module]) -> CompressedLayer:
    from velora_torch.layers import compressed_class
    from velora_torch.stepping import watch

    watch()  # this may be a new process
    kind = compressed_class(original)
    return kind.__new__(kind)


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
