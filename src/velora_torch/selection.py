"""Which layers of a model are compressed, and for all others the reason why not."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from velora_torch.config import VeloraConfig, matches_components
from velora_torch.heads import head_modules
from velora_torch.integrations.peft import Unit, dormant, own_velora, units
from velora_torch.layers import linear_shape, uncompressible
from velora_torch.layers.adapter import CompressedAdapter
from velora_torch.layers.conv1d import is_conv1d
from velora_torch.layers.quantized import is_quantised, looks_quantised

NOT_TARGETED = "not in targets"
PLAIN = "the model is not compressed"
LATER = "added after the model was compressed"


@dataclass(frozen=True)
class Chosen:
    """A layer to compress."""

    name: str
    module: nn.Module
    groups: int
    size: int
    dormant: bool = False
    """It belongs to an adapter that is not active now."""


@dataclass(frozen=True)
class ChosenAdapter:
    """An adapter to compress that computes with parameters of its own."""

    unit: Unit
    parts: list[str]
    """Names of the modules that hold the parameters whose products are compressed."""
    widths: list[int]
    """D of these products."""


@dataclass(frozen=True)
class Selection:
    """What to compress, and why the rest stays exact (by layer name)."""

    chosen: list[Chosen]
    exact: dict[str, str]
    adapters: list[ChosenAdapter]


class Selector:
    """Decides layer by layer for one model and configuration."""

    def __init__(self, model: nn.Module, config: VeloraConfig) -> None:
        self.holders = {
            name: module
            for name, module in model.named_modules()
            if list(module.parameters(recurse=False)) or looks_quantised(module)
        }
        self.units = units(model)
        self._unit_of = {part: unit for unit in self.units for part in unit.parts}
        self.dormant, self._own_velora = dormant(model), own_velora(model)
        adapted = {unit.name: unit.module for unit in self.units}
        self.targeted, self.unmatched = _targeted(self.holders | adapted, config)
        for unit in self.units:
            if unit.name in self.targeted:
                self.targeted |= set(unit.parts)
        self._model, self._config = model, config
        self._all_linear = config.targets == "all-linear"
        self._owners = _owners(model)
        self._has_adapters = config.train_frozen and has_adapters(model)
        self._heads = head_modules(model) if self._all_linear else set()

    def why_exact(self, name: str, module: nn.Module) -> str | None:
        """Why a layer stays exact; ``None`` if it can be compressed and is wanted."""
        if name in self._unit_of:
            return self._why_exact_part(self._unit_of[name], name, module)
        dormant = module in self.dormant
        reason = self._own_velora.get(name) or _why_exact(
            name, module, self._model, self._owners, self._config, dormant
        )
        if reason is None and self._has_adapters and _is_frozen(module):
            reason = (
                "frozen beside PEFT adapters, which train the model: coefficients here would not "
                "be saved with them"
            )
        if reason is None and name not in self.targeted:
            reason = NOT_TARGETED
        if reason is None and id(module) in self._heads:
            reason = "output head of the model (name it in targets to compress it)"
        if reason is None and self._all_linear:
            try:
                self.sizes(name, module)
            except ValueError as error:
                reason = str(error)
        return reason

    def _why_exact_part(self, unit: Unit, part: str, module: nn.Module) -> str | None:
        """Why the parameters of a part of an adapter stay exact."""
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            return "frozen: keeps no input"
        if unit.reason is not None:
            return unit.reason
        if part not in self.targeted:
            return NOT_TARGETED
        if self._all_linear and unit.layered:
            return "beside the matrices of its adapter (name it in targets to compress it)"
        if not unit.widths([part]):
            return "part of an adapter that takes no input of full width"
        return None if self._widths(unit, [part]) else self._too_narrow(unit, part)

    def _widths(self, unit: Unit, parts: list[str]) -> list[int]:
        widths = []
        for width in sorted(unit.widths(parts)):
            try:
                self._config.groups(unit.name, width)
            except ValueError:
                continue
            widths.append(width)
        return widths

    def _too_narrow(self, unit: Unit, part: str) -> str:
        try:
            self._config.groups(unit.name, max(unit.widths([part])))
        except ValueError as error:
            return str(error)
        raise AssertionError("some width is wide enough")

    def in_adapter(self, name: str) -> bool:
        """Whether a module holds parameters with which an adapter computes by itself."""
        return name in self._unit_of

    def is_compressed_adapter(self, name: str) -> bool:
        """Whether it holds parameters of an adapter that is compressed already."""
        unit = self._unit_of.get(name)
        return unit is not None and isinstance(unit.module, CompressedAdapter)

    def adapters(self) -> list[ChosenAdapter]:
        """The adapters to compress that compute with parameters of their own."""
        found = []
        for unit in self.units:
            parts = [p for p, m in unit.parts.items() if self.why_exact(p, m) is None]
            if parts:
                found.append(ChosenAdapter(unit, parts, self._widths(unit, parts)))
        return found

    def sizes(self, name: str, module: nn.Module) -> tuple[int, int]:
        """(G, M) of a layer."""
        return self._config.groups(name, linear_shape(module)[1])


def select(model: nn.Module, config: VeloraConfig) -> Selection:
    """Divide the layers of a model into those to compress and those to leave exact.

    Raises:
        ValueError: a target matches nothing (with near misses), or nothing can be compressed.
    """
    selector = Selector(model, config)
    if selector.unmatched:
        raise ValueError(_no_match(selector.unmatched[0], model))
    chosen: list[Chosen] = []
    exact: dict[str, str] = {}
    for name, module in selector.holders.items():
        reason = selector.why_exact(name, module)
        if reason is not None:
            exact[name] = reason
        elif not selector.in_adapter(name):
            sizes = selector.sizes(name, module)
            chosen.append(Chosen(name, module, *sizes, dormant=module in selector.dormant))
    adapters = selector.adapters()
    if not (chosen or adapters):
        raise ValueError(_nothing(config, selector.targeted, exact))
    return Selection(chosen, exact, adapters)


def _targeted(holders: dict[str, nn.Module], config: VeloraConfig) -> tuple[set[str], list[str]]:
    """Names of the layers that targets ask for, and the targets that match no layer."""
    targets = config.targets
    if targets == "all-linear":
        return set(holders), []
    if callable(targets):
        return {name for name, module in holders.items() if targets(name, module)}, []
    if isinstance(targets, str):
        matches: list[tuple[str, Callable[[str], bool]]] = [(targets, _regular(targets))]
    else:
        matches = [(part, _component(part)) for part in targets]
    found: set[str] = set()
    unmatched = []
    for text, match in matches:
        names = {name for name in holders if match(name)}
        if not names:
            unmatched.append(text)
        found |= names
    return found, unmatched


def _regular(pattern: str) -> Callable[[str], bool]:
    return lambda name: bool(re.fullmatch(pattern, name)) or matches_components(name, pattern)


def _component(part: str) -> Callable[[str], bool]:
    return lambda name: matches_components(name, part)


def _no_match(target: str, model: nn.Module) -> str:
    full = {name for name, module in model.named_modules() if uncompressible(module) is None}
    linear = {name.rsplit(".", 1)[-1] for name in full}
    # "attn.v_prj" is near "attn.v_proj", though far from "model.layers.0.attn.v_proj".
    word = re.sub(r"^\W+", "", target)  # ".*v_prj" as "v_prj"
    depth = word.count(".") + 1
    endings = {".".join(name.split(".")[-depth:]) for name in full}
    near = difflib.get_close_matches(word, sorted(endings), n=3, cutoff=0.6)
    near += difflib.get_close_matches(word, sorted(linear), n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(dict.fromkeys(near))}" if near else ""
    known = ", ".join(sorted(linear)[:12]) or "none"
    return f"target {target!r} matches no layer{hint}. Linear layers of this model: {known}"


def _nothing(config: VeloraConfig, targeted: set[str], exact: dict[str, str]) -> str:
    reasons = [
        f"{name or '(the model itself)'}: {exact[name]}" for name in exact if name in targeted
    ]
    none = "the model has no layer with parameters"
    if exact:
        none = f"it asks for none of the {len(exact)} layers with parameters"
    shown = "\n  ".join(reasons[:8]) or none
    more = f"\n  and {len(reasons) - 8} more" if len(reasons) > 8 else ""
    return f"targets={config.targets!r} leaves nothing to compress:\n  {shown}{more}"


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _why_exact(
    name: str,
    module: nn.Module,
    model: nn.Module,
    owners: dict[int, list[str]],
    config: VeloraConfig,
    dormant: bool = False,
) -> str | None:
    parameters = list(module.parameters(recurse=False))
    if looks_quantised(module) and not is_quantised(module):
        return uncompressible(module)
    may_hold = (config.train_frozen or dormant) and (
        isinstance(module, nn.Linear) or is_conv1d(module) or is_quantised(module)
    )
    if not (may_hold or any(parameter.requires_grad for parameter in parameters)):
        return "frozen: keeps no input"
    if any(is_lazy(parameter) for parameter in parameters):
        return "not initialised yet: run one batch through the model before compressing it"
    if _is_fused(module, parameters):
        return "fused weight of more than two dimensions"
    reason = uncompressible(module)
    if reason is not None:
        return reason
    weight = module._parameters["weight"]
    assert weight is not None
    if not (weight.requires_grad or config.train_frozen or dormant):
        return "frozen: keeps no input"
    others = [other for other in owners[id(weight)] if other != name]
    if others:
        return f"tied: shares its weight with {', '.join(others)}"
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention uses its weight without calling the layer"
    up = _up_projection(name, model)
    if up is not None and not _names(config, up):
        return "up-projection of an adapter: its input is low-rank already"
    return None


def _up_projection(name: str, model: nn.Module) -> str | None:
    """The part of a name that says up-projection: ``lora_B`` where there is a ``lora_A``."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.endswith("_B"):
            parent = model.get_submodule(".".join(parts[:index]))
            if f"{part[:-1]}A" in parent._modules:
                return part
    return None


def _is_frozen(module: nn.Module) -> bool:
    weight = module._parameters["weight"]
    return weight is not None and not weight.requires_grad


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into a model; does not import PEFT."""
    loaded = sys.modules.get("peft.tuners.tuners_utils")
    return loaded is not None and any(isinstance(m, loaded.BaseTunerLayer) for m in model.modules())


def _names(config: VeloraConfig, part: str) -> bool:
    targets = config.targets
    if callable(targets):
        return True
    return any(part in text for text in ([targets] if isinstance(targets, str) else targets))


def _is_fused(module: nn.Module, parameters: list[nn.Parameter]) -> bool:
    """Whether a module holds several matrices in one weight, as mixtures of experts do.

    A class token or position embedding of shape (1, N, D) is one matrix.
    """
    if isinstance(module, (nn.modules.conv._ConvNd, nn.utils.parametrize.ParametrizationList)):
        return False
    return any(p.dim() > 2 and p.shape[0] > 1 for p in parameters)
