"""Which layers of a model are compressed, and for all others the reason why not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from velora_torch.config import VeloraConfig, matches_components
from velora_torch.layers import linear_shape, uncompressible

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


@dataclass(frozen=True)
class Selection:
    """What to compress, and why the rest stays exact (by layer name)."""

    chosen: list[Chosen]
    exact: dict[str, str]


class Selector:
    """Decides layer by layer for one model and configuration."""

    def __init__(self, model: nn.Module, config: VeloraConfig) -> None:
        self.holders = {
            name: module
            for name, module in model.named_modules()
            if list(module.parameters(recurse=False))
        }
        self.targeted, self.unmatched = _targeted(self.holders, config)
        self._model, self._config = model, config
        self._all_linear = config.targets == "all-linear"
        self._owners = _owners(model)
        self._heads = _output_heads(model) if self._all_linear else []

    def why_exact(self, name: str, module: nn.Module) -> str | None:
        """Why a layer stays exact; ``None`` if it can be compressed and is wanted."""
        reason = _why_exact(name, module, self._model, self._owners, self._config)
        if reason is None and name not in self.targeted:
            reason = NOT_TARGETED
        if reason is None and any(module is head for head in self._heads):
            reason = "output head of the model (name it in targets to compress it)"
        if reason is None and self._all_linear:
            try:
                self.sizes(name, module)
            except ValueError as error:
                reason = str(error)
        return reason

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
        if reason is None:
            chosen.append(Chosen(name, module, *selector.sizes(name, module)))
        else:
            exact[name] = reason
    if not chosen:
        raise ValueError(_nothing(config, selector.targeted, exact))
    return Selection(chosen, exact)


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


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """Output heads of the transformers models in ``model``, which may be wrapped in a module."""
    heads = []
    for module in model.modules():
        find = getattr(module, "get_output_embeddings", None)
        if find is None:
            continue
        try:
            heads.append(find())
        except (AttributeError, NotImplementedError):  # transformers models without a head
            continue
    return heads


def _why_exact(
    name: str,
    module: nn.Module,
    model: nn.Module,
    owners: dict[int, list[str]],
    config: VeloraConfig,
) -> str | None:
    parameters = list(module.parameters(recurse=False))
    if not any(parameter.requires_grad for parameter in parameters):
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
    if not weight.requires_grad:
        return "frozen: keeps no input"
    others = [other for other in owners[id(weight)] if other != name]
    if others:
        return f"tied: shares its weight with {', '.join(others)}"
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention uses its weight without calling the layer"
    if "lora_B" in name.split(".") and not _names(config, "lora_B"):
        return "up-projection of an adapter: its input is low-rank already"
    return None


def _names(config: VeloraConfig, part: str) -> bool:
    targets = config.targets
    if callable(targets):
        return True
    return any(part in text for text in ([targets] if isinstance(targets, str) else targets))


def _is_fused(module: nn.Module, parameters: list[nn.Parameter]) -> bool:
    """Whether a module holds several matrices in one weight, as mixtures of experts do.

    A class token or position embedding of shape (1, N, D) is one matrix.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    return any(p.dim() > 2 and p.shape[0] > 1 for p in parameters)
