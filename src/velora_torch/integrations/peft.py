"""PEFT: which of a model's adapters compute by themselves, and what of them can be compressed.

LoRA's matrices are linear layers, compressed like others. Most other methods hold parameters and
compute with them in the forward of the adapted layer; such a layer is compressed as one adapter
(:mod:`velora_torch.layers.adapter`). What its forward does with its input is found by
trying it on a few tokens, so nothing here knows a method by its name.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from velora_torch.layers import CompressedLayer, uncompressible
from velora_torch.layers.adapter import CompressedAdapter
from velora_torch.layers.adapter_sites import FindProducts, Product
from velora_torch.layers.conv1d import is_conv1d


@dataclass(frozen=True)
class Found:
    """A product of an activation with something trained, in an adapter's forward."""

    kind: str
    features: int
    """D, the width of the activation."""
    attributes: frozenset[str]
    """Attributes of the adapter that hold the parameters of the trained operand."""


@dataclass
class Unit:
    """An adapted layer that computes with parameters of its own."""

    name: str
    module: nn.Module
    parts: dict[str, nn.Module]
    """Modules that hold those parameters, by their name in the model."""
    layered: bool
    """Whether the method's matrices are linear layers, which are compressed by themselves."""
    features: int = 0
    outputs: int = 0
    reason: str | None = None
    """Why it cannot be compressed."""
    products: list[Found] = field(default_factory=list)

    def inside(self, part: str) -> str:
        """The attribute of the adapter that holds a part; ``""`` for the adapter itself."""
        return part[len(self.name) :].lstrip(".").split(".")[0]

    def widths(self, parts: Iterable[str]) -> set[int]:
        """D of the products that some of these parts (names in the model) have a share in."""
        inside = {self.inside(part) for part in parts}
        return {found.features for found in self.products if found.attributes & inside}


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's adapted layers by name, ``{}`` where PEFT is not loaded; does not import it."""
    loaded = sys.modules.get("peft.tuners.tuners_utils")
    if loaded is None:
        return {}
    kind = loaded.BaseTunerLayer
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def units(model: nn.Module) -> list[Unit]:
    """The adapters of a model that compute by themselves, with what of them can be compressed."""
    found = []
    known: dict[Any, Unit] = {}
    for name, layer in tuner_layers(model).items():
        unit = _unit(name, layer)
        if unit is None:
            continue
        if isinstance(unit.module, CompressedAdapter):
            unit.products = [Found(*product) for product in unit.module.velora_adapter.products]
            unit.features, unit.outputs = _shape(layer.get_base_layer())
            found.append(unit)
            continue
        key = _signature(layer)
        if key not in known:
            _look(unit)
            known[key] = unit
        like = known[key]
        unit.reason, unit.products = like.reason, like.products
        unit.features, unit.outputs = like.features, like.outputs
        found.append(unit)
    return found


def wrappers(model: nn.Module) -> dict[str, Any]:
    """PEFT's wrappers of modules that are trained whole (``modules_to_save``), by name."""
    loaded = sys.modules.get("peft.utils.other")
    if loaded is None:
        return {}
    kind = loaded.ModulesToSaveWrapper
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def dormant(model: nn.Module) -> set[nn.Module]:
    """Modules of adapters that are not active now, in a model that trains another one.

    Compressed with the others, they go on as they should when their adapter is made active.
    """
    holders = [*tuner_layers(model).values(), *wrappers(model).values()]
    held = [(layer, adapter, entry) for layer in holders for adapter, entry in _entries(layer)]
    if not any(p.requires_grad for _, _, entry in held for p in entry.parameters()):
        return set()
    resting = (entry for layer, adapter, entry in held if adapter not in layer.active_adapters)
    return {module for entry in resting for module in entry.modules()}


def own_velora(model: nn.Module) -> dict[str, str]:
    """Names of LoRA matrices that PEFT's own VeLoRA compresses, and the reason to leave them."""
    reasons = {}
    for name, layer in tuner_layers(model).items():
        for adapter in getattr(layer, "lora_velora_num_groups", {}):
            reasons[f"{name}.lora_A.{adapter}"] = (
                "PEFT's own VeLoRA compresses its input (velora_config of its LoraConfig): leave "
                "velora_config out to compress it here"
            )
    return reasons


def saved_heads(head: nn.Module) -> list[nn.Module]:
    """The copies of an output head that PEFT trains, if it does (``modules_to_save``)."""
    return [entry for _, entry in _entries(head)] if head in wrappers(head).values() else []


def _entries(layer: Any) -> list[tuple[str, nn.Module]]:
    """(adapter name, module) of the modules that an adapted layer holds for its adapters."""
    held = [layer._modules.get(attribute) for attribute in layer.adapter_layer_names]
    return [pair for d in held if isinstance(d, nn.ModuleDict) for pair in d.items()]


def _unit(name: str, layer: Any) -> Unit | None:
    parts, layered = {}, False
    for module_name, module in _own_modules(layer):
        if not list(module.parameters(recurse=False)):
            continue
        if isinstance(module, CompressedLayer) or uncompressible(module) is None:
            layered = True
        else:
            parts[".".join(filter(None, (name, module_name)))] = module
    return Unit(name, layer, parts, layered) if parts else None


def _own_modules(layer: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules of an adapted layer without those of the layer that it adapts."""
    base = layer._modules.get("base_layer")
    skip = set() if base is None else set(base.modules())
    for name, module in layer.named_modules():
        if module not in skip:
            yield name, module


def _signature(layer: Any) -> Any:
    """Equal for layers whose forwards do the same."""
    shapes = tuple(
        (name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()
    )
    base = layer.get_base_layer()
    return type(layer), type(base), tuple(layer.active_adapters), layer.merged, shapes


# ------------------------------------------------------------------ what a forward does


def _look(unit: Unit) -> None:
    """Try the forward, and note its products or why there are none."""
    layer: Any = unit.module
    base = layer.get_base_layer()
    linear = isinstance(base, nn.Linear) or is_conv1d(base)
    if not linear:
        unit.reason = f"adapts a {type(base).__name__}, which is not a linear layer"
        return
    unit.features, unit.outputs = _shape(base)
    if not any(p.requires_grad for part in unit.parts.values() for p in part.parameters()):
        unit.reason = "frozen: keeps no input"
        return
    if layer.merged:
        unit.reason = "merged into its layer: unmerge the adapter to train it"
        return
    try:
        unit.products = _rehearse(layer, unit)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        unit.reason = f"its forward cannot be tried on a sample ({type(e).__name__}: {e})"
        return
    wide = [product for product in unit.products if product.features in _shape(base)]
    if unit.products and not wide:
        unit.reason = f"the trained matrices of {_kind(layer)} take no input of full width"
    elif not wide:
        unit.reason = (
            f"{_kind(layer)} does not multiply an activation by one trained matrix or scale"
        )
    unit.products = wide


def _kind(layer: Any) -> str:
    """``oft.Linear``: PEFT's classes are called alike."""
    return ".".join([*type(layer).__module__.split(".")[-2:-1], type(layer).__name__])


def _shape(base: Any) -> tuple[int, int]:
    """(D, O) of a linear layer; quantised ones pack their weight."""
    if is_conv1d(base):
        rows, columns = base.weight.shape
        return rows, columns
    return base.in_features, base.out_features


def _rehearse(layer: Any, unit: Unit) -> list[Found]:
    """Run a shallow copy on six tokens of zeros: parameters are shared, nothing is trained."""
    trial = copy.copy(layer)
    trial._forward_hooks, trial._forward_pre_hooks = OrderedDict(), OrderedDict()
    owners = {
        id(p): name.split(".")[0] if "." in name else ""
        for name, p in layer.named_parameters(remove_duplicate=False)
    }
    found: list[Found] = []

    def note(product: Product) -> Tensor | None:
        attributes = frozenset(owners[leaf] for leaf in product.leaves)
        found.append(Found(product.kind, product.features, attributes))
        return None

    sample = next(p for part in unit.parts.values() for p in part.parameters(recurse=False))
    dtype = layer.get_base_layer().weight.dtype
    dtype = dtype if dtype.is_floating_point else sample.dtype
    products = FindProducts(layer.parameters(), note)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_evaluating(layer, trial))
        stack.enter_context(torch.random.fork_rng([sample.device] if sample.is_cuda else []))
        if isinstance(sample, FakeTensor):
            stack.enter_context(sample.fake_mode)
        x = sample.new_zeros((3, 2, unit.features), dtype=dtype).requires_grad_()
        stack.enter_context(products)
        trial.forward(products.mark(x))
    return found


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no vectors are drawn, and no adapter left out by chance."""
    before = {module: module.training for root in modules for module in root.modules()}
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training
