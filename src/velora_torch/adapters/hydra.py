"""Hydra: two low-rank branches on a frozen linear layer, one beside it and one behind it.

    y0 = W x + b
    y  = y0 + (alpha / r) * (B_p A_p x + B_s A_s y0)

Source: "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", Kim et al.,
2023, arXiv 2309.06922. A_p is r x D, A_s is r x O; B_p and B_s (O x r) start at zero, so that the
first output is the frozen layer's.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from velora_torch.adapters.attach import Adapted, adapter_dtype, attach, check_bare, freeze
from velora_torch.adapters.targets import Targets, choose, is_leaf_linear
from velora_torch.heads import block_prefixes, head_or_task_head, output_embeddings
from velora_torch.layers.conv1d import is_conv1d

ModelT = TypeVar("ModelT", bound=nn.Module)

ALL = "all-linear"


class LowRank(nn.Module):
    """``B A x``: (..., D) -> (..., O), computed in the type of A and B.

    Args:
        features: D.
        outputs: O.
        rank: r.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        rank: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hydra_A = nn.Linear(features, rank, bias=False, device=device, dtype=dtype)
        self.hydra_B = nn.Linear(rank, outputs, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.hydra_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Project down and up again."""
        weight = self.hydra_A._parameters["weight"]  # not .weight, which folds when compressed
        assert weight is not None
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        up: Tensor = self.hydra_B(self.hydra_A(x))
        return up


class Hydra(nn.Module):
    """The two branches of one layer.

    Args:
        features: D, inputs of the layer.
        outputs: O, its outputs.
        rank: r, of each branch.
        alpha: numerator of the branches' scale alpha / r.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        rank: int,
        alpha: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scaling = alpha / rank
        self.parallel = LowRank(features, outputs, rank, device, dtype)
        self.sequential = LowRank(outputs, outputs, rank, device, dtype)

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        """``y0 + s (B_p A_p x + B_s A_s y0)`` in the type of y0; x (..., D), y0 (..., O)."""
        both = self.parallel(x) + self.sequential(y0)
        if self.scaling != 1.0:
            both = both * self.scaling
        return y0 + both.to(y0.dtype)

    def extra_repr(self) -> str:
        """The scale."""
        return f"scaling={self.scaling:g}"


class WithHydra(Adapted):
    """Mixed in before the class of a linear layer that has the two branches."""

    child = "hydra"
    method = "Hydra"
    hydra: Hydra

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with both branches."""
        y: Tensor = self.hydra(x, super().forward(x))
        return y


def add_hydra(
    model: ModelT,
    rank: int = 4,
    alpha: float | None = None,
    targets: Targets = ALL,
    *,
    head: list[str] | None = None,
    dtype: torch.dtype | None = None,
) -> ModelT:
    """Freeze a model and give its linear layers Hydra's two branches, in place.

    Outputs stay what they were until training begins. To compress the inputs of the branches,
    ``velora_torch.compress(model, VeloraConfig(targets=["hydra_A"]))``.

    Args:
        model: any module.
        rank: r, of each branch.
        alpha: numerator of the branches' scale alpha / r; ``None`` for a scale of 1.
        targets: ``"all-linear"`` for the linear layers of the repeated blocks (of the whole model,
            if it has none); or names, a regular expression, or a function. The paper uses the
            attention's output projection and the last layer of the MLP.
        head: names of the modules that stay plain and train whole. ``None`` finds the head of a
            task; a language model's output embeddings stay plain and frozen.
        dtype: of the branches; ``None`` for float32 or wider, as PEFT does.

    Returns:
        The same model.

    Raises:
        ValueError: nothing to adapt, a target matches nothing, no head is found, the model has
            adapters already or is compressed. The model is then unchanged.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive whole number, got {rank!r}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha!r}")
    check_bare(model)
    names = head_or_task_head(model, head)
    plain = [*names, *output_embeddings(model)]
    blocks = block_prefixes(model) if targets == ALL else ()

    def is_kind(name: str, module: nn.Module) -> bool:
        return is_leaf_linear(module) and (not blocks or name.startswith(blocks))

    found = choose(model, targets, ALL, is_kind, plain)
    freeze(model, names)
    for module in found.values():
        weight = module._parameters["weight"]
        assert weight is not None
        features, outputs = _sizes(module)
        kind = adapter_dtype(weight, dtype)
        strength = rank if alpha is None else alpha
        adapter = Hydra(features, outputs, rank, strength, weight.device, kind)
        attach(module, WithHydra, adapter.train(module.training))
    return model


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(D, O), which the shape of a packed weight does not tell."""
    if is_conv1d(module):
        weight = module._parameters["weight"]
        assert weight is not None
        return weight.shape[0], weight.shape[1]
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features
