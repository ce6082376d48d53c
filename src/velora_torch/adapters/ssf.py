"""SSF: scale and shift the output of every operator of a frozen model.

    y = gamma * op(x) + beta

Source: "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", Lian et al.,
NeurIPS 2022, arXiv 2210.08823.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from velora_torch.adapters.attach import Adapted, adapter_dtype, attach, check_bare, freeze
from velora_torch.adapters.targets import Targets, choose, is_leaf_linear
from velora_torch.heads import head_or_task_head, output_embeddings
from velora_torch.layers.conv1d import is_conv1d
from velora_torch.layers.scale_shift import ScaleShift

ModelT = TypeVar("ModelT", bound=nn.Module)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHANNELS_SECOND = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
ALL = "all"


class WithScaleShift(Adapted):
    """Mixed in before the class of an operator whose output is scaled and shifted."""

    child = "ssf"
    method = "SSF"
    ssf: ScaleShift

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The operator's output, scaled and shifted."""
        y: Tensor = self.ssf(super().forward(*args, **kwargs))
        return y


def add_ssf(
    model: ModelT,
    targets: Targets = ALL,
    *,
    head: list[str] | None = None,
    shift: bool | None = None,
    dtype: torch.dtype | None = None,
) -> ModelT:
    """Freeze a model and insert a :class:`ScaleShift` after its operators, in place.

    An operator is a linear layer (quantised or not), a norm, or a convolution, in any model. The
    scale of ``blocks.0.mlp.fc1`` is ``blocks.0.mlp.fc1.ssf.weight``, its shift
    ``blocks.0.mlp.fc1.ssf.bias``; all other names stay what they were. To compress the scales'
    inputs, ``velora_torch.compress(model, VeloraConfig(targets=["ssf"]))``.

    Args:
        model: any module.
        targets: ``"all"`` operators, or some of them: names, a regular expression, or a function.
        head: names of the modules that stay plain and train whole. ``None`` finds the head of a
            task; a language model's output embeddings stay plain and frozen.
        shift: whether to shift too. ``None`` shifts where the operator has a bias, which the shift
            can be merged into (all operators of a ViT); ``True`` shifts everywhere.
        dtype: of scales and shifts; ``None`` for float32 or wider.

    Returns:
        The same model.

    Raises:
        ValueError: nothing to adapt, a target matches nothing, no head is found, the model has
            adapters already or is compressed. The model is then unchanged.
    """
    check_bare(model)
    names = head_or_task_head(model, head)
    plain = [*names, *output_embeddings(model)]
    found = choose(model, targets, ALL, lambda _, module: is_operator(module), plain)
    freeze(model, names)
    for module in found.values():
        weight = module._parameters["weight"]
        assert weight is not None
        has_bias = module._parameters.get("bias") is not None
        adapter = ScaleShift(
            _outputs(module),
            shift=has_bias if shift is None else shift,
            dim=_dim(module),
            device=weight.device,
            dtype=adapter_dtype(weight, dtype),
        )
        attach(module, WithScaleShift, adapter.train(module.training))
    return model


def is_operator(module: nn.Module) -> bool:
    """Whether a module is a linear layer, a norm or a convolution with a weight."""
    if module._parameters.get("weight") is None or next(module.children(), None) is not None:
        return False
    return is_leaf_linear(module) or isinstance(module, CONVOLUTIONS) or is_norm(module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: called so, with a vector ``weight`` and perhaps a ``bias``."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    return (
        "norm" in type(module).__name__.lower()
        and parameters.keys() <= {"weight", "bias"}
        and all(p.dim() == 1 for p in parameters.values())
    )


def _outputs(module: nn.Module) -> int:
    """D, the number of features of a module's output."""
    if isinstance(module, nn.Linear):
        return module.out_features  # a packed weight has another shape
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.shape[1 if is_conv1d(module) else 0]


def _dim(module: nn.Module) -> int:
    """The dimension of the output that holds the features."""
    if isinstance(module, CONVOLUTIONS):
        return -1 - len(module.kernel_size)
    return 1 if isinstance(module, CHANNELS_SECOND) else -1
