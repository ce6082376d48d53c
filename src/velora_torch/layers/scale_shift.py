"""A scale and a shift of features: the layer, and its compressed form.

The layer comes from :func:`velora_torch.adapters.add_ssf`. To train its scale it keeps its whole
input, T x D numbers; compressed, it keeps T x G. The scale has D numbers only and trains itself:
there are no coefficients, nothing is folded, and any optimizer will do.

Shapes: T tokens, D features, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from velora_torch.layers.base import CompressedLayer, _compute_dtype, _in_transform
from velora_torch.layers.tensor_parallel import refuse_if_split
from velora_torch.recomputation.deferred import plain
from velora_torch.subtoken.factored import project_to_save
from velora_torch.subtoken.scale_shift import CompressedScaleShift as Compressed
from velora_torch.subtoken.scale_shift import apply_scale_shift


class ScaleShift(nn.Module):
    """``y = weight * x + bias`` for every feature, in the type of x.

    Starts near the identity, as in SSF: scales are drawn from N(1, 0.02), shifts from N(0, 0.02).

    Args:
        features: D.
        shift: whether there is a ``bias``.
        dim: dimension of the input that holds the features; -3 for images with channels first.
        device: of the parameters.
        dtype: of the parameters.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        *,
        shift: bool = True,
        dim: int = -1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        shifts = nn.Parameter(torch.empty_like(self.weight)) if shift else None
        self.register_parameter("bias", shifts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw scales near one and shifts near zero."""
        nn.init.normal_(self.weight, mean=1.0, std=0.02)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift x, which has D numbers in dimension ``dim``."""
        _check_shape(x, len(self.weight), self.dim)
        return apply_scale_shift(x, self.weight, self.bias, self.dim)

    def extra_repr(self) -> str:
        """Size and options."""
        return f"{len(self.weight)}, shift={self.bias is not None}, dim={self.dim}"


class CompressedScaleShift(CompressedLayer):
    """A :class:`ScaleShift` that keeps z (T x G) instead of its input."""

    transposed = False
    factors = False
    dim: int

    @property
    def outputs(self) -> int:
        """D: as many as inputs."""
        return self.features

    @property
    def features(self) -> int:
        """D."""
        return len(self.raw_weight)

    @property
    def weight(self) -> Tensor:
        """The scale itself, which trains."""
        return self.raw_weight

    def forward(self, x: Tensor) -> Tensor:
        """``y = weight * x + bias``, keeping z = x v (T x G) instead of x."""
        x = plain(x)  # the result of an activation may be deferred
        refuse_if_split(self, x)
        state, weight, bias = self.velora, self.raw_weight, self._parameters["bias"]
        _check_shape(x, self.features, self.dim)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return apply_scale_shift(x, weight, bias, self.dim)
        functional = _in_transform()
        if functional:
            self._check_functional()
        tokens = x.detach().movedim(self.dim, -1)
        if state.due and self.training and x.numel() > 0 and not functional:
            self.choose(tokens)
        z = None
        if state.drawn or x.numel() == 0:
            z = project_to_save(tokens, self.velora_vectors, self.shared, _compute_dtype(x))
        y: Tensor = Compressed.apply(
            x, weight, bias, z, self.velora_vectors, state.config.scale, self.dim, state.name
        )
        return y


def is_scale_shift(module: nn.Module) -> bool:
    """Whether the module computes what :class:`ScaleShift` does."""
    return isinstance(module, ScaleShift) and type(module).forward is ScaleShift.forward


def _check_shape(x: Tensor, features: int, dim: int) -> None:
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != features:
        raise ValueError(
            f"ScaleShift of {features} features got an input of shape {tuple(x.shape)}: dimension "
            f"{dim} must hold the features (the `dim` of the layer says which)"
        )
