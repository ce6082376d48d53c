"""Folding adapters into the weights they adapt, so that a plain checkpoint is left.

SSF:    W <- diag(gamma) W,                b <- gamma b + beta
Hydra:  W <- (I + s B_s A_s) W + s B_p A_p,  b <- (I + s B_s A_s) b

Shapes: D input features, O output features, r rank.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from velora_torch.adapters.attach import Adapted, adapted_modules, detach
from velora_torch.adapters.hydra import LowRank, WithHydra
from velora_torch.adapters.ssf import CHANNELS_SECOND, WithScaleShift, is_norm
from velora_torch.layers import CompressedLayer

ModelT = TypeVar("ModelT", bound=nn.Module)
Merged = tuple[Tensor, Tensor | None]
"""Weight and bias."""


def merge_adapters(model: ModelT, *, add_bias: bool = False) -> ModelT:
    """Fold SSF and Hydra into the weights they adapt, in place: plain modules are left.

    Outputs stay the same but for rounding to the weights' type. Weights stay frozen.

    Args:
        model: a model that adapters were added to.
        add_bias: give linear layers and convolutions a bias where a shift needs one. A checkpoint
            then has keys that the architecture may not know.

    Returns:
        The same model.

    Raises:
        ValueError: there are no adapters, the model is compressed, or an adapter cannot be merged
            (a quantised or shared weight; a shift and no bias). The model is then unchanged.
    """
    adapted = adapted_modules(model)
    if not adapted:
        raise ValueError("this model has no SSF or Hydra adapters to merge")
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            raise ValueError(
                f"this model is compressed (the first layer is {name!r}), and coefficients may be "
                f"pending: call velora_torch.restore(model), which folds them, before "
                f"merge_adapters"
            )
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    ready: list[tuple[Adapted, Merged]] = []
    for name, module in adapted.items():
        _check_weight(name, module, owners)
        ready.append((module, _merged(name, module, add_bias)))
    for module, (weight, bias) in ready:
        _replace(module, weight, bias)
        detach(module)
    return model


def _check_weight(name: str, module: Adapted, owners: dict[int, set[str]]) -> None:
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"the {module.method} adapter of {name!r} cannot be merged: its weight is computed by "
            f"a parametrization; remove that first "
            f"(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    if not (plain and weight.is_floating_point() and weight.dtype.itemsize >= 2):
        raise ValueError(
            f"the {module.method} adapter of {name!r} cannot be merged into a quantised weight "
            f"({type(weight).__name__}, {weight.dtype}). Keep the adapters and save them alone "
            f"(adapter_state_dict), or dequantise the model first (model.dequantize())"
        )
    own = {f"{name}.weight", f"{name}.bias"}
    held = [p for p in module._parameters.values() if p is not None]
    others = set[str]().union(*(owners[id(parameter)] for parameter in held)) - own
    if others:
        raise ValueError(
            f"the {module.method} adapter of {name!r} cannot be merged: its weight is shared with "
            f"{min(others)!r}, which would change too. Leave {name!r} out of targets, or untie "
            f"the weights"
        )


@torch.no_grad()
def _merged(name: str, module: Adapted, add_bias: bool) -> Merged:
    """The merged weight, as stored, and bias, in float32 or wider."""
    weight, bias = _wide(module._parameters["weight"]), _wide(module._parameters.get("bias"))
    assert weight is not None
    if isinstance(module, WithHydra):
        return _with_branches(module, weight, bias)
    assert isinstance(module, WithScaleShift)
    gamma, beta = module.ssf.weight.to(weight.dtype), module.ssf.bias
    if beta is not None and bias is None:
        _check_no_bias(name, module, add_bias)
        bias = torch.zeros_like(gamma)
    if is_norm(module):
        offset = _offset(name, module)
        weight = gamma * (weight + offset) - offset
    elif _transposed(module):
        weight = weight * gamma
    else:
        weight = weight * gamma.view(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        bias = bias * gamma if beta is None else bias * gamma + beta
    return weight, bias


def _with_branches(module: WithHydra, weight: Tensor, bias: Tensor | None) -> Merged:
    hydra = module.hydra
    parallel_OD, sequential_OO = (
        hydra.scaling * _product(branch, weight.dtype)
        for branch in (hydra.parallel, hydra.sequential)
    )
    weight_OD = weight.t() if _transposed(module) else weight
    weight_OD = weight_OD + sequential_OO @ weight_OD + parallel_OD
    if bias is not None:
        bias = bias + sequential_OO @ bias
    return weight_OD.t() if _transposed(module) else weight_OD, bias


def _product(branch: LowRank, dtype: torch.dtype) -> Tensor:
    return branch.hydra_B.weight.to(dtype) @ branch.hydra_A.weight.to(dtype)


def _wide(parameter: Tensor | None) -> Tensor | None:
    if parameter is None:
        return None
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


def _transposed(module: Adapted) -> bool:
    """Whether the weight is a matrix (D, O), as in GPT-2's ``Conv1D``."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.dim() == 2 and not isinstance(module, nn.Linear)


def _check_no_bias(name: str, module: Adapted, add_bias: bool) -> None:
    """A shift is to become the bias of a module that has none."""
    can = not is_norm(module)
    if can and add_bias:
        return
    way = "call merge_adapters(model, add_bias=True) to give it one, or " if can else ""
    raise ValueError(
        f"the shift of {name!r} cannot be merged, since this {module.plain_class.__name__} has no "
        f"bias: {way}add adapters without shifts there (add_ssf(model, shift=None))"
    )


def _offset(name: str, module: Adapted) -> float:
    """c of a norm that multiplies by (weight + c): 0, or 1 where weights are kept around zero."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, *CHANNELS_SECOND)):
        return 0.0
    copied = copy.deepcopy(module)
    detach(copied)
    twin: nn.Module = copied
    twin.double().to("cpu")
    features = len(twin._parameters["weight"])  # type: ignore[arg-type]
    x = torch.sin(torch.arange(1, 3 * features + 1, dtype=torch.float64) ** 2).view(3, features)
    outputs = []
    for value in (0.0, 1.0):
        for parameter in twin.parameters():
            parameter.zero_()
        twin._parameters["weight"].fill_(value)  # type: ignore[union-attr]
        try:
            outputs.append(twin(x))
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the SSF adapter of {name!r} cannot be merged: what {type(twin).__name__} does "
                f"with its weight cannot be found out ({error}). Leave it out of targets"
            ) from None
    zero, one = outputs
    for offset in (0.0, 1.0):
        if torch.allclose(zero, offset * (one - zero), rtol=1e-3, atol=1e-6):
            return offset
    raise ValueError(
        f"the SSF adapter of {name!r} cannot be merged: {type(twin).__name__} does not multiply "
        f"by its weight. Leave it out of targets"
    )


@torch.no_grad()
def _replace(module: Adapted, weight: Tensor, bias: Tensor | None) -> None:
    own, own_bias = module._parameters["weight"], module._parameters.get("bias")
    assert own is not None
    own.copy_(weight)
    if bias is None:
        return
    if own_bias is not None:
        own_bias.copy_(bias)
    else:
        module.bias = nn.Parameter(bias.to(own.dtype), requires_grad=False)
