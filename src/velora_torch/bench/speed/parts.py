"""Where the time of a compressed layer goes: the parts of its step, each timed by itself.

Each part is the library's own function on the case's shapes. What a whole step takes beyond the
sum of its parts is autograd's, the module's and the optimizer's hooks.

Shapes: T tokens, D input features, G groups, M features per sub-token, O output features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import velora_torch
from velora_torch.bench.speed.prepare import Prepared, count_flops, prepare
from velora_torch.bench.speed.variants import FULL, GROUPS, OPTIMIZER, Part
from velora_torch.bench.speed.workload import Workload
from velora_torch.config import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.subtoken.factored import apply_linear, project
from velora_torch.subtoken.kernels.fold import operators_only

DECAY = 1.0 - OPTIMIZER["lr"] * OPTIMIZER["weight_decay"]
_WHOLE = {"step": "factored", "plain-step": "plain"}


def prepare_part(part: Part, workload: Workload) -> Prepared:
    """A part of the step of a compressed or of the plain layer, taken once."""
    if part.name in _WHOLE:
        (variant,) = [one for one in FULL if one.name == _WHOLE[part.name]]
        return prepare(variant, workload)
    make = _PARTS[part.name]
    compute = make(workload)
    kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def step() -> None:
        kept["result"] = compute()
        if kept["result"].is_cuda:
            torch.cuda.synchronize()

    return Prepared(step, count_flops(step), lambda: kept["result"])


Compute = Callable[[], Tensor]


def _layer(workload: Workload) -> CompressedLayer:
    """A compressed copy of the workload's layer, with vectors."""
    model = copy.deepcopy(workload.model)
    (layer,) = velora_torch.compress(model, VeloraConfig(num_groups=GROUPS)).children()
    assert isinstance(layer, CompressedLayer)
    workload.gradients(model)
    layer.coef.grad = None
    return layer


def _product(workload: Workload) -> Compute:
    (layer,) = workload.model.children()
    x_TD, weight_OD = workload.inputs["x"], layer.weight
    assert isinstance(weight_OD, Tensor)
    return lambda: apply_linear(x_TD, weight_OD, None, transposed=False)


def _projection(workload: Workload) -> Compute:
    layer, x_TD = _layer(workload), workload.inputs["x"]
    return lambda: project(x_TD, layer.velora_vectors, layer.shared)


def _input_gradient(workload: Workload) -> Compute:
    (layer,) = workload.model.children()
    dY_TO, weight_OD = workload.inputs["dY"], layer.weight
    assert isinstance(weight_OD, Tensor)
    return lambda: dY_TO @ weight_OD


def _factor(workload: Workload) -> Compute:
    dY_TO = workload.inputs["dY"]
    z_TG = _projection(workload)().detach()
    return lambda: (dY_TO.t() @ z_TG).float()


def _factor_by_rows(workload: Workload) -> Compute:
    dY_TO = workload.inputs["dY"]
    z_TG = _projection(workload)().detach()
    return lambda: (z_TG.t() @ dY_TO).t().contiguous().float()


SIBLINGS = 3
"""Layers with one input: q, k and v."""


def _sibling_vectors(workload: Workload) -> Tensor:
    """(siblings, M), of the input's type."""
    x_TD = workload.inputs["x"]
    size = _layer(workload).velora_vectors.shape[1]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIBLINGS, size, generator=generator).to(x_TD)


def _siblings_apart(workload: Workload) -> Compute:
    x_TD, v_SM = workload.inputs["x"], _sibling_vectors(workload)
    vectors = [v.expand(GROUPS, -1) for v in v_SM]
    return lambda: torch.stack([project(x_TD, v_GM, shared=True) for v_GM in vectors])


def _siblings_together(workload: Workload) -> Compute:
    x_TD, v_MS = workload.inputs["x"], _sibling_vectors(workload).t().contiguous()

    def compute() -> Tensor:
        z_TGS = (x_TD.reshape(-1, len(v_MS)) @ v_MS).view(len(x_TD), GROUPS, SIBLINGS)
        return z_TGS.permute(2, 0, 1).contiguous()

    return compute


def _weight_gradient(workload: Workload) -> Compute:
    dY_TO, x_TD = workload.inputs["dY"], workload.inputs["x"]
    return lambda: dY_TO.t() @ x_TD


def _optimizer(parameter: Tensor) -> Compute:
    parameter = nn.Parameter(parameter.detach().clone())
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW([parameter], **OPTIMIZER)

    def compute() -> Tensor:
        optimizer.step()
        return parameter

    return compute


def _coefficient_optimizer(workload: Workload) -> Compute:
    return _optimizer(_layer(workload).coef)


def _plain_optimizer(workload: Workload) -> Compute:
    (layer,) = workload.model.children()
    assert isinstance(layer.weight, Tensor)
    return _optimizer(layer.weight)


def _fold(workload: Workload) -> Compute:
    layer = _layer(workload)
    layer.velora.direction = "sign"

    def compute() -> Tensor:
        layer.fold(DECAY)
        return layer.raw_weight

    return compute


def _fold_with_operators(workload: Workload) -> Compute:
    fold = _fold(workload)

    def compute() -> Tensor:
        with operators_only():
            return fold()

    return compute


_PARTS: dict[str, Callable[[Workload], Compute]] = {
    "product": _product,
    "projection": _projection,
    "input-gradient": _input_gradient,
    "factor": _factor,
    "optimizer": _coefficient_optimizer,
    "fold": _fold,
    "weight-gradient": _weight_gradient,
    "plain-optimizer": _plain_optimizer,
    "fold-operators": _fold_with_operators,
    "factor-rows": _factor_by_rows,
    "siblings-apart": _siblings_apart,
    "siblings-together": _siblings_together,
}
