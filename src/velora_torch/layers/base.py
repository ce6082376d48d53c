"""What every compressed layer is: a plain layer plus coefficients, vectors and a few counters.

Compressing changes the *class* of a module in place (as ``nn.utils.parametrize`` does), so its
name, hooks, parameters and ``state_dict`` keys stay what they were. The weight is frozen; the
trainable parameter is ``coef`` (O x G, zero after every fold).

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from velora_torch import ranks
from velora_torch.config import RANDOM, VeloraConfig
from velora_torch.layers.protocol import PROCESS, PlainOutside
from velora_torch.layers.state import TENSORS, LayerState
from velora_torch.layers.tensor_parallel import (
    all_features,
    is_partitioning,
    localise,
    parts_of,
    shards,
)
from velora_torch.recomputation.deferred import plain
from velora_torch.sharding import Block, as_sharded, block_of, is_sharded, like, local, rows_of
from velora_torch.subtoken import vectors as choose
from velora_torch.subtoken.factored import (
    ExposedWeight,
    apply_linear,
    expand,
    factored_linear,
    project,
)
from velora_torch.subtoken.folding import fold_
from velora_torch.values import has_values, is_identity

LIVE: weakref.WeakSet[CompressedLayer] = weakref.WeakSet()
"""Every compressed layer alive: how an optimizer's step finds the layers it has trained."""


class CompressedLayer(PlainOutside):
    """Mixed in before the class of a plain layer; see :func:`velora_torch.compress`."""

    transposed: bool
    factors = True
    """Whether coefficients can stand for the weight's change; if not, the weight itself trains."""
    foldable = True
    """Whether coefficients can be folded into the weight."""
    velora_vectors: Tensor
    velora_delta: Tensor | None
    velora_running: Tensor | None
    velora_turn: Tensor | None
    velora_sign_turn: Tensor | None
    _shard: tuple[int, int, int]
    """Identity, version and dimensions of sharded coefficients, when they were last known."""

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

    @property
    def shared(self) -> bool:
        """Whether all groups have the same vector."""
        return self.velora.config.vectors == "shared"

    @property
    def direction_GM(self) -> Tensor:
        """e: what the coefficients multiply when they are folded, (G, M)."""
        v = self.velora_vectors
        return v.sign() if self.velora.direction == "sign" else v

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        """``y = x Wᵀ + b``, keeping z = x v (T x G) for the backward pass instead of x."""
        return self.product(x, self._parameters["bias"])

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
            z = project(x.detach(), v, self.shared).to(_compute_dtype(x))
        dense = v if coef is None else None
        return factored_linear(
            x, weight, bias, coef, z, dense, e, state.config.scale, self.transposed, state.name
        )

    # ------------------------------------------------------------------ vectors

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
        per_group = config.vectors == "per_group"
        if config.init in RANDOM or x is None:
            raw = choose.random(
                state.name,
                config.seed,
                state.draws,
                (state.groups, state.size),
                per_group,
                old.dtype,
                config.init,
            ).to(old.device)
        else:
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

    # ------------------------------------------------------------------ coefficients

    def _version_now(self) -> int:
        coef = self._parameters["coef"]
        return -1 if coef is None else coef._version

    def adopt_coef(self) -> None:
        """Take ``coef`` as it is now for known, and watch its gradient."""
        coef = self._parameters["coef"]
        is_new = id(coef) != self.__dict__.get("_own")
        self._note_seen()
        self._mark: tuple[int, int] | None = None
        LIVE.add(self)
        if is_new and coef is not None:
            this, trains = weakref.ref(self), coef.requires_grad

            def accumulated(parameter: Tensor) -> None:
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
        if self._mark is None:
            return False
        grad = self.coef.grad
        return grad is None or (id(grad), grad._version) != self._mark

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
