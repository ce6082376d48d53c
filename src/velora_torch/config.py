"""What a user can ask for, validated before anything is touched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Init = Literal["average", "running_average", "batch_average", "random", "rademacher", "svd"]
Vectors = Literal["shared", "per_group"]
Gradient = Literal["factored", "dense"]
Rounding = Literal["stochastic", "nearest"]
Purpose = Literal["lora", "full", "pretrain"]
Targets = str | Iterable[str] | Callable[[str, Any], bool]
"""The callable takes a name and its ``nn.Module``, which is not written here: a recipe is checked
without importing PyTorch."""

DEFAULT_NUM_GROUPS = 32
RANDOM: tuple[Init, ...] = ("random", "rademacher")
"""Choices of v that need no data."""

RECOMMENDED: dict[Purpose, dict[str, Any]] = {
    "lora": {
        "targets": "all-linear",  # on PEFT's adapters: their down-projections
        "sub_token_size": 4,
        "init": "random",
        "vectors": "per_group",
    },
    "full": {
        "targets": "all-linear",
        "sub_token_size": 8,
        "init": "random",
        "vectors": "per_group",
        "refresh_every": 50,
        "track_delta": False,
    },
    "pretrain": {
        "targets": "all-linear",
        "sub_token_size": 4,
        "init": "rademacher",
        "vectors": "per_group",
        "refresh_every": 200,
        "track_delta": False,
    },
}
"""What measured best for a purpose, docs/results/fine-tuning.md and pretraining.md."""


@dataclass(frozen=True, kw_only=True)
class VeloraConfig:
    """How :func:`velora_torch.compress` compresses a model.

    Symbols: ``T`` tokens, ``D`` input features, ``G`` groups, ``M`` features per sub-token
    (``D = G * M``, the last group padded if need be), ``O`` output features.
    """

    targets: Targets = "all-linear"
    """Which layers: ``"all-linear"`` (every trainable linear layer and scale but the model's
    head), a list of layer names (each matches whole components of a dotted name, so ``"v_proj"``
    also covers ``v_proj.lora_A.default``), a regular expression for the whole dotted name, or a
    function ``f(name, module) -> bool``."""

    num_groups: int | Mapping[str, int] | None = None
    """G, the numbers kept per token: one value, or one per layer name (longest match wins;
    the key ``"default"`` is for all others). 32 unless ``sub_token_size`` is given."""

    sub_token_size: int | Mapping[str, int] | None = None
    """M, the features that one kept number stands for, instead of ``num_groups``."""

    init: Init = "average"
    """How v is chosen: ``average`` (mean sub-token of the first training batch, then fixed: the
    paper's choice), ``running_average`` (of all batches so far), ``batch_average`` (of each step's
    first batch), ``random`` (seeded, Gaussian), ``rademacher`` (seeded, entries ±1/√M: Adam and its
    kin move weights along sign(v), which is v itself then) or ``svd`` (first right singular vector
    of a sub-sample of the first batch). Paper, section 3 and table 6; ``rademacher`` is not in
    it."""

    vectors: Vectors = "shared"
    """One v for all groups of a layer (paper), or a v of its own ``per_group``."""

    refresh_every: int | None = None
    """Optimizer steps between new vectors; ``None`` keeps them for the whole run."""

    scale: float = 1.0
    """Factor on the weight gradient (paper, Algorithm 1). Adam-like optimizers do not see it."""

    gradient: Gradient = "factored"
    """``factored`` trains the O x G coefficients; ``dense`` fills ``weight.grad`` with the O x D
    gradient, as the paper does."""

    seed: int = 0
    """Seed of random vectors and of stochastic rounding."""

    rounding: Rounding = "stochastic"
    """How a fold rounds to a 16-bit weight. ``stochastic`` keeps, on average, updates that are
    smaller than the weight's resolution; ``nearest`` loses them (docs/results/bf16.md)."""

    fold_every: int | None = 1
    """Optimizer steps between folds. In between, the forward pass adds the pending coefficients.
    ``None`` never folds by itself, so that the base weights stay what they were."""

    running_decay: float = 0.9
    """Weight of the past in ``init="running_average"``."""

    track_delta: bool = True
    """Keep the sum of all folded coefficients (O x G numbers in float32 per layer), which
    :func:`velora_torch.export_lora` needs. ``False`` saves that memory."""

    train_frozen: bool = False
    """Give coefficients to targeted layers whose weight is frozen or quantised too: the base stays
    as it is, and the coefficients train on top of it, pending (needs ``fold_every=None``).
    ``False`` leaves such layers alone, so that on a quantised base only adapters are compressed."""

    @classmethod
    def recommended(cls, purpose: Purpose, **changes: Any) -> VeloraConfig:
        """The settings that measured best for a purpose (docs/results).

        Args:
            purpose: ``"lora"``, the adapters of PEFT's LoRA (at LoRA's own learning rate it costs
                accuracy on images and on a quantised base, docs/results/fine-tuning.md);
                ``"full"``, full-parameter fine-tuning; ``"pretrain"``, from random weights with
                little memory; in longer runs full training pulls away from it
                (docs/results/pretraining.md).
            changes: fields to set otherwise; ``num_groups`` replaces ``sub_token_size``.

        Raises:
            ValueError: an unknown purpose, or settings that contradict each other.
        """
        check_choice("purpose", purpose, get_args(Purpose))
        return cls(**recommended_settings(purpose, changes) | changes)

    def __post_init__(self) -> None:
        check_choice("init", self.init, get_args(Init))
        check_choice("vectors", self.vectors, get_args(Vectors))
        check_choice("gradient", self.gradient, get_args(Gradient))
        check_choice("rounding", self.rounding, get_args(Rounding))
        self._check_targets()
        if self.num_groups is not None and self.sub_token_size is not None:
            raise ValueError(
                "num_groups and sub_token_size say the same thing (in_features = num_groups * "
                f"sub_token_size); got num_groups={self.num_groups!r} and "
                f"sub_token_size={self.sub_token_size!r}: give one of them"
            )
        if self.num_groups is None and self.sub_token_size is None:
            object.__setattr__(self, "num_groups", DEFAULT_NUM_GROUPS)
        for field in ("num_groups", "sub_token_size"):
            value = getattr(self, field)
            if isinstance(value, Mapping):
                object.__setattr__(self, field, dict(value))
                if not value:
                    raise ValueError(f"{field} is an empty dict: name at least one layer")
                for name, size in value.items():
                    _check_count(f"{field}[{name!r}]", size)
            elif value is not None:
                _check_count(field, value)
        for field in ("refresh_every", "fold_every"):
            if getattr(self, field) is not None:
                _check_count(field, getattr(self, field))
        if not _is_number(self.scale) or not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be a positive finite number, got {self.scale!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        if not _is_number(self.running_decay) or not 0 <= self.running_decay < 1:
            raise ValueError(f"running_decay must be in [0, 1), got {self.running_decay!r}")
        if not isinstance(self.track_delta, bool):
            raise ValueError(f"track_delta must be True or False, got {self.track_delta!r}")
        self._check_train_frozen()
        moves = self.refresh_every or self.init in ("running_average", "batch_average")
        if self.fold_every is None and moves and self.gradient == "factored":
            raise ValueError(
                "fold_every=None keeps all coefficients pending, and new vectors may only be "
                f"drawn after a fold; use refresh_every=None and a fixed init (got "
                f"refresh_every={self.refresh_every!r}, init={self.init!r}), or let folds happen"
            )

    def _check_train_frozen(self) -> None:
        if not isinstance(self.train_frozen, bool):
            raise ValueError(f"train_frozen must be True or False, got {self.train_frozen!r}")
        if self.train_frozen and self.gradient == "dense":
            raise ValueError(
                "train_frozen=True trains coefficients, and gradient='dense' has none: a frozen "
                "weight gets no gradient. Use gradient='factored'"
            )
        if self.train_frozen and self.fold_every is not None:
            raise ValueError(
                f"train_frozen=True leaves the base as it is (nothing can be folded into a 4-bit "
                f"weight), so its coefficients stay pending: set fold_every=None (got "
                f"fold_every={self.fold_every!r})"
            )

    def _check_targets(self) -> None:
        if isinstance(self.targets, str) and self.targets:
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ValueError(
                    f"targets={self.targets!r} is neither 'all-linear' nor a valid regular "
                    f"expression: {error}"
                ) from None
        elif not callable(self.targets):
            names = tuple(self.targets) if isinstance(self.targets, Iterable) else ()
            if not names or not all(isinstance(name, str) and name for name in names):
                raise ValueError(
                    f"targets must be 'all-linear', layer names, a regular expression or a "
                    f"function; got {self.targets!r}"
                )
            object.__setattr__(self, "targets", names)

    def groups(self, name: str, in_features: int) -> tuple[int, int]:
        """(G, M) of the layer ``name`` with ``in_features`` inputs.

        Raises:
            ValueError: more groups than features, or no entry for this layer.
        """
        if self.sub_token_size is not None:
            size = _for_layer(self.sub_token_size, name, "sub_token_size")
            if size > in_features:
                raise ValueError(
                    f"sub_token_size={size} is larger than the {in_features} input features of "
                    f"layer {name!r}; use at most {in_features}"
                )
            return -(-in_features // size), size
        count = _for_layer(self.num_groups, name, "num_groups")
        if count > in_features:
            raise ValueError(
                f"num_groups={count} is larger than the {in_features} input features of layer "
                f"{name!r}; use at most {in_features}"
            )
        return count, -(-in_features // count)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; a function given as ``targets`` becomes its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if callable(self.targets):
            values["targets"] = f"<function {getattr(self.targets, '__name__', 'targets')}>"
        elif not isinstance(self.targets, str):
            values["targets"] = list(self.targets)
        return values


def recommended_settings(purpose: Purpose, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What is recommended for a purpose, without what ``changes`` say otherwise."""
    regrouped = {"sub_token_size"} if changes.get("num_groups") is not None else set()
    left_out = changes.keys() | regrouped
    return {name: value for name, value in RECOMMENDED[purpose].items() if name not in left_out}


def matches_components(name: str, part: str) -> bool:
    """Whether ``part`` is a run of whole components of the dotted ``name``."""
    return f".{part}." in f".{name}."


def _for_layer(value: int | Mapping[str, int] | None, name: str, field: str) -> int:
    if isinstance(value, int):
        return value
    assert value is not None
    keys = [key for key in value if key != "default" and matches_components(name, key)]
    if keys:
        return value[max(keys, key=len)]
    if "default" in value:
        return value["default"]
    raise ValueError(
        f"{field} has no entry for layer {name!r}; it names {', '.join(map(repr, value))}. Add the "
        f"layer, or a 'default', or narrow targets"
    )


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the choices, and the nearest, for any other value."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown {field} {value!r}{hint}: choose one of {', '.join(choices)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_count(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} must be a positive whole number, got {value!r}")
