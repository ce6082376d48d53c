"""A transformers model split over processes by its own plan for tensor parallel, and whole again.

A plan names layers by patterns, and a style for each. Layers that come in pairs (colwise, rowwise)
are split; those whose output is whole on every rank anyway are left whole, which computes the same.
"""

from __future__ import annotations

import random
import re
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from velora_torch.layers.base import CompressedLayer
from velora_torch.sharding import is_sharded, local, whole, whole_in_first

COLWISE, ROWWISE = "colwise", "rowwise"
WHOLE = ("colwise_gather_output", "rowwise_split_input", "embedding_rowwise", "replicate")
"""Styles of layers that take and give whole tensors."""
SUMMED = "replicated_with_grad_allreduce"
"""The style of layers that are whole on every rank and see a part of the features each."""


class PlanError(ValueError):
    """A model can't be split; says why, and what to do."""


_SPLIT: weakref.WeakKeyDictionary[nn.Module, SplitModel] = weakref.WeakKeyDictionary()
"""Models that are split now."""


class SplitModel:
    """A model while its layers are split, and sharded by FSDP2 over other processes if need be.

    Args:
        model: from transformers, compressed or not; changed in place.
        ranks: processes that split each layer; `num_attention_heads` must be a multiple. All that
            there are, or the model is sharded over groups of so many.
        shards: classes of the modules that FSDP2 shards each by itself.

    Raises:
        PlanError: it has no plan, or one that can't be followed; nothing was changed.
    """

    def __init__(self, model: nn.Module, ranks: int, shards: Collection[str] = ()) -> None:
        self._model, self.ranks, self.groups = model, ranks, dist.get_world_size() // ranks
        layers, summed = _planned(model, ranks)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        shape = (self.groups, ranks)
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "tensor"))
        self._mesh = mesh["tensor"]
        self._summed = [model.get_submodule(name) for name in summed]
        registries = [registry for name in layers for registry in _hooks(model.get_submodule(name))]
        former = [set(registry) for registry in registries]
        styles = {COLWISE: ColwiseParallel, ROWWISE: RowwiseParallel}
        plan = {name: styles[style]() for name, style in layers.items()}
        parallelize_module(model, self._mesh, plan)
        self._hooks = [
            (registry, registry.keys() - known)
            for registry, known in zip(registries, former, strict=True)
        ]
        if self.groups > 1:
            for module in reversed(list(model.modules())[1:]):
                if type(module).__name__ in shards:
                    fully_shard(module, mesh=mesh["data"])
            fully_shard(model, mesh=mesh["data"])
        _SPLIT[model] = self

    @property
    def group(self) -> int:
        """Which of the groups this process is in, which take examples of their own."""
        return dist.get_rank() // self.ranks

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up what processes have of gradients whose layer sees a part of the features in each.

        Once for each step, after its last backward pass; all must ask.
        """
        for module in self._summed:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(local(parameter.grad), group=self._mesh.get_group())

    def share_random(self) -> None:
        """Let all that take the same examples draw the same random numbers from here on."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        states: list[Any] = [random.getstate(), torch.get_rng_state(), cuda]
        first = self.group * self.ranks
        dist.broadcast_object_list(states, first, self._mesh.get_group())
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if cuda is not None:
            torch.cuda.set_rng_state(states[2])

    def join(self) -> None:
        """Make every layer whole again, with what it has learnt; all processes must ask.

        What FSDP2 has sharded stays so.
        """
        if self.groups > 1:
            return
        for registry, added in self._hooks:
            for key in added:
                del registry[key]
        for module in self._model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and is_sharded(parameter):
                    joined = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
                    module.register_parameter(name, joined)
            for name, buffer in module._buffers.items():
                if is_sharded(buffer):
                    module._buffers[name] = whole(buffer)
        del _SPLIT[self._model]


def split_of(model: nn.Module) -> SplitModel | None:
    """How a model is split now, if it is."""
    return _SPLIT.get(model)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state with whole tensors, in the first process; all must ask."""
    return {name: whole_in_first(tensor) for name, tensor in model.state_dict().items()}


def _hooks(layer: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return layer._forward_pre_hooks, layer._forward_hooks


def check_plan(model: nn.Module, ranks: int) -> None:
    """See that a model can be split.

    Raises:
        PlanError: says why not.
    """
    _planned(model, ranks)


def _planned(model: nn.Module, ranks: int) -> tuple[dict[str, str], list[str]]:
    """The layers to split with their style, and those whose gradients are to be summed."""
    kind = type(model).__name__
    plan: dict[str, str] = dict(getattr(model, "_tp_plan", None) or {})
    if not plan:
        raise PlanError(
            f"{kind} has no plan for tensor parallel (`base_model_tp_plan` of its configuration). "
            f"Leave --tensor-parallel out: --strategy fsdp2 shards any model"
        )
    _check_heads(model, ranks)
    styles = dict(_styled(model, plan))
    unknown = {n: s for n, s in styles.items() if s not in (COLWISE, ROWWISE, SUMMED, *WHOLE)}
    layers: dict[str, str] = {}
    for name, style in styles.items():
        module = model.get_submodule(name)
        inside = next((other for other in unknown if f"{name}.".startswith(f"{other}.")), None)
        if inside is not None and (isinstance(module, nn.Linear) or style in (COLWISE, ROWWISE)):
            raise PlanError(
                f"the plan of {kind} for tensor parallel has {inside!r} as {unknown[inside]}, "
                f"which is not supported. Leave --tensor-parallel out: --strategy fsdp2 shards "
                f"any model"
            )
        if style not in (COLWISE, ROWWISE):
            continue
        if not isinstance(module, nn.Linear):
            raise PlanError(
                f"the plan of {kind} for tensor parallel splits {name!r}, which is no nn.Linear "
                f"but {type(module).__name__}. Leave --tensor-parallel out: --strategy fsdp2 "
                f"shards any model"
            )
        features = module.out_features if style == COLWISE else module.in_features
        if features % ranks:
            raise PlanError(
                f"layer {name!r} is to be split {style}, and {features} features are no multiple "
                f"of {ranks} processes: choose --tensor-parallel so that they are"
            )
        _check_groups(name, module, style, features // ranks)
        layers[name] = style
    if not layers:
        raise PlanError(
            f"the plan of {kind} for tensor parallel splits none of its layers. Leave "
            f"--tensor-parallel out: --strategy fsdp2 shards any model"
        )
    return layers, [name for name, style in styles.items() if style == SUMMED]


def _check_groups(name: str, layer: nn.Module, style: str, features: int) -> None:
    """See that a process has whole groups of a compressed layer's features."""
    if style == ROWWISE and isinstance(layer, CompressedLayer) and features % layer.velora.size:
        raise PlanError(
            f"layer {name!r} is to be split {style}, {features} features in each process, and its "
            f"groups have {layer.velora.size}: choose velora.sub_token_size or velora.num_groups "
            f"so that a process has whole groups, or leave the layer out of velora.targets"
        )


def _check_heads(model: nn.Module, ranks: int) -> None:
    config: Any = model.config
    config = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % ranks:
            raise PlanError(
                f"{name} is {heads}, no multiple of {ranks} processes: heads can't be split. "
                f"Choose --tensor-parallel so that they can"
            )


def _styled(model: nn.Module, plan: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Modules that a plan names, with their style; parameters that it names are no modules."""
    patterns = [
        (re.compile(r"\d+".join(map(re.escape, pattern.split("*")))), style)
        for pattern, style in plan.items()
    ]
    for name, _ in model.named_modules():
        for pattern, style in patterns:
            if pattern.fullmatch(name):
                yield name, style
