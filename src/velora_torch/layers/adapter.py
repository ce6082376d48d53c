"""An adapter that computes with its parameters itself, such as PEFT's AdaLoRA, LoHa or (IA)³.

Its class is changed in place: the forward is the adapter's own, and every product of its input
with something trained keeps z = x v (T x G) instead of x. Parameters stay what they are, with
gradients of their own shape, so merging, saving, optimizers and rank allocation know no difference.

Shapes: T tokens, D features, G groups, M features per sub-token.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from velora_torch import ranks
from velora_torch.compiling import uncompiled
from velora_torch.config import RANDOM, VeloraConfig
from velora_torch.integrations import deepspeed
from velora_torch.layers.adapter_sites import FindProducts, Product
from velora_torch.layers.base import _compute_dtype, _in_transform
from velora_torch.layers.drawing import random_vectors, vectors_from
from velora_torch.recomputation.deferred import plain
from velora_torch.subtoken import vectors as choose
from velora_torch.subtoken.factored import expand, factored_linear, project_to_save
from velora_torch.subtoken.scale_shift import CompressedScaleShift
from velora_torch.values import has_values

ADAPTERS: weakref.WeakSet[CompressedAdapter] = weakref.WeakSet()
"""Every compressed adapter alive."""

COUNTERS = ("features", "due", "drawn", "draws")
"""Fields of :class:`Site` that are JSON values."""

_CLASSES: dict[type[nn.Module], type[CompressedAdapter]] = {}


@dataclass
class Site:
    """The vectors of one product of an adapter's forward."""

    features: int
    vectors: Tensor
    """(G, M)."""
    running: Tensor | None = None
    due: bool = True
    """The next training forward draws vectors."""
    drawn: bool = False
    draws: int = 0
    unchecked: Tensor | None = field(default=None, repr=False)
    """Whether the first draw found a direction (0-d boolean), not looked at yet."""


@dataclass
class AdapterState:
    """What a compressed adapter remembers."""

    name: str
    config: VeloraConfig = field(repr=False)
    wanted: tuple[str, ...]
    """Attributes of the adapter that hold the parameters whose products are compressed; ``""``
    for parameters of the adapter itself."""
    widths: tuple[int, ...]
    """D of the products that are compressed: others have low-rank inputs already."""
    products: tuple[tuple[str, int, frozenset[str]], ...]
    """(kind, D, attributes that hold the trained operand) of all products of the forward."""
    steps: int = 0
    asked: bool = False
    """All ranks were asked for what reaches its products, once at least."""
    sites: dict[str, Site] = field(default_factory=dict)


class FirstProduct(Function):
    """``y = x Wᵀ + b`` for a computed weight W (O x D) and an x that needs no gradient.

    Saves z (T x G) alone: not W, which only the gradient of x would need, and which is no
    parameter that is in memory anyway. dW = scale * (dYᵀ z) v (paper, Algorithm 1).
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        """Compute y."""
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save z and v."""
        _x, weight, bias, z, v, scale = inputs
        ctx.save_for_backward(z, v)
        ctx.features, ctx.dtype, ctx.scale = weight.shape[1], weight.dtype, scale
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weight and the bias."""
        (dY,) = grad_outputs
        z_TG, v_GM = ctx.saved_tensors
        dY_TO = dY.reshape(-1, dY.shape[-1])
        dW = db = None
        if ctx.needs_input_grad[1]:
            factor_OG = dY_TO.t() @ z_TG.to(dY_TO.dtype)
            dW = expand(factor_OG, (v_GM * ctx.scale).to(factor_OG.dtype), ctx.features)
            dW = dW.to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            db = dY_TO.sum(0).to(ctx.bias_dtype)
        return None, dW, db, None, None, None


class CompressedAdapter(nn.Module):
    """Mixed in before the class of an adapter; see :func:`velora_torch.compress`."""

    plain_class: type[nn.Module]
    velora_adapter: AdapterState

    def start(self, state: AdapterState) -> None:
        """Turn from a plain adapter, whose class has just been changed, into a compressed one."""
        self.velora_adapter = state
        ADAPTERS.add(self)
        watch()

    def stop(self) -> None:
        """Become the plain adapter again."""
        ADAPTERS.discard(self)
        del self.__dict__["velora_adapter"]
        self.__class__ = self.plain_class  # type: ignore[assignment]

    @uncompiled
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The adapter's own forward; its products with trained operands keep z instead of x."""
        x = plain(x)
        if not (torch.is_grad_enabled() and isinstance(x, Tensor)) or _in_transform():
            return super().forward(x, *args, **kwargs)
        state = self.velora_adapter
        named = dict(self.named_parameters(remove_duplicate=False))
        # A parameter list that an adapter was given later belongs to the same dictionary.
        wanted = {id(p) for name, p in named.items() if _belongs(name, state.wanted)}
        counts: dict[str, int] = {}

        def take(product: Product) -> Tensor | None:
            if product.features not in state.widths or not product.leaves & wanted:
                return None
            kind = f"{product.kind}-{product.features}"
            counts[kind] = counts.get(kind, 0) + 1
            return self._product(f"{kind}-{counts[kind]}", product)

        found = FindProducts(iter(named.values()), take)
        with found:
            return super().forward(found.mark(x), *args, **kwargs)

    def _product(self, key: str, product: Product) -> Tensor | None:
        """The result of a product, ``None`` to compute it exactly."""
        state, x = self.velora_adapter, product.x
        site = self._site(key, product.features, x.dtype, x.device)
        if x.numel() == 0:
            return None
        if site.due and self.training:
            _choose(site, x.detach(), f"{state.name}/{key}", state)
        if not site.drawn:  # evaluation before training
            return None
        v, scale = site.vectors, state.config.scale
        shared = state.config.vectors == "shared"
        if product.kind == "scale":
            x = x.to(torch.result_type(x, product.operand))
            z = project_to_save(x, v, shared, x.dtype)
            gamma_D = product.operand.reshape(-1)
            y: Tensor = CompressedScaleShift.apply(x, gamma_D, None, z, v, scale, -1, state.name)
            return y
        z = project_to_save(x, v, shared, _compute_dtype(x))
        transposed = product.kind == "matmul"
        if not x.requires_grad:
            weight = product.operand.t() if transposed else product.operand
            z_TG, bias = z.detach(), product.bias
            y_linear: Tensor = FirstProduct.apply(x, weight, bias, z_TG, v, scale)
            return y_linear
        return factored_linear(
            x, product.operand, product.bias, None, z, v, None, scale, transposed, state.name
        )

    def _site(self, key: str, features: int, dtype: torch.dtype, device: torch.device) -> Site:
        state = self.velora_adapter
        if key not in state.sites:
            groups, size = state.config.groups(state.name, features)
            wide = torch.promote_types(dtype, torch.float32)
            mask = choose.feature_mask(groups, size, features, device)
            state.sites[key] = Site(features, choose.uniform(mask, wide))
        site = state.sites[key]
        if site.vectors.device != device:
            site.vectors = site.vectors.to(device)
        return site

    def needs_data(self) -> bool:
        """Whether the next training forward is to choose vectors from its products."""
        state = self.velora_adapter
        if not self.training or state.config.init in RANDOM:
            return False
        return any(site.due for site in state.sites.values()) or not (state.sites or state.asked)

    def draw_from(self, found: Mapping[str, ranks.Gathered]) -> None:
        """Choose vectors from what all ranks saw of products, by the adapter's name and theirs."""
        state, start = self.velora_adapter, f"{self.velora_adapter.name}/"
        state.asked = True
        device = next(self.parameters()).device
        for name, gathered in found.items():
            if not name.startswith(start):
                continue
            key, features = name.removeprefix(start), gathered.rows.shape[1]
            site = self._site(key, features, gathered.dtype, device)
            if site.due:
                _draw(site, gathered.rows.to(device), name, state)
        for site in state.sites.values():
            site.due = site.due and not site.drawn

    def after_step(self) -> None:
        """An optimizer has changed parameters of this adapter: vectors may be due."""
        state = self.velora_adapter
        config = state.config
        state.steps += 1
        every = config.refresh_every
        moves = config.init in ("running_average", "batch_average")
        redraw = moves or (every is not None and state.steps % every == 0)
        for site in state.sites.values():
            unchecked, site.unchecked = site.unchecked, None
            bad = unchecked is not None and has_values(unchecked) and not bool(unchecked)
            if redraw or bad:
                site.due = True

    def described(self) -> dict[str, Any]:
        """What a checkpoint needs besides :meth:`tensors`, as JSON values."""
        state = self.velora_adapter
        sites = {key: {f: getattr(site, f) for f in COUNTERS} for key, site in state.sites.items()}
        return {"config": state.config.to_dict(), "steps": state.steps, "sites": sites}

    def tensors(self) -> dict[str, Tensor]:
        """Vectors and running averages, by product."""
        found = {}
        for key, site in self.velora_adapter.sites.items():
            found[f"{key}.vectors"] = site.vectors.contiguous()
            if site.running is not None:
                found[f"{key}.running"] = site.running.contiguous()
        return found

    def load(self, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take what :meth:`described` and :meth:`tensors` gave."""
        device = next(self.parameters()).device
        state = self.velora_adapter
        state.steps, state.sites = described["steps"], {}
        for key, counters in described["sites"].items():
            running = tensors.get(f"{key}.running")
            state.sites[key] = Site(
                vectors=tensors[f"{key}.vectors"].to(device),
                running=None if running is None else running.to(device),
                **counters,
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class, since the compressed class is made at run time."""
        return _blank, (self.plain_class,), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        adapter = copy.copy(state["velora_adapter"])
        adapter.sites = {key: copy.copy(site) for key, site in adapter.sites.items()}
        super().__setstate__({**state, "velora_adapter": adapter})
        ADAPTERS.add(self)


def compressed_adapter_class(original: type[nn.Module]) -> type[CompressedAdapter]:
    """The compressed subclass of an adapter's class: one for each, made when first needed."""
    if original not in _CLASSES:
        body = {"__module__": __name__, "plain_class": original}
        _CLASSES[original] = type(
            f"Compressed{original.__name__}", (CompressedAdapter, original), body
        )
    return _CLASSES[original]


def compressed_adapters(model: nn.Module) -> dict[str, CompressedAdapter]:
    """The compressed adapters of a model by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedAdapter)}


@functools.cache
def watch() -> None:
    """Notice every optimizer's steps, once in a process."""
    register_optimizer_step_post_hook(_after_step)
    deepspeed.watch_steps(lambda zero: None, lambda zero: _stepped(deepspeed.parts(zero)))


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _stepped((group["params"], group) for group in optimizer.param_groups)


def _stepped(parts: Iterable[tuple[Iterable[Tensor], Any]]) -> None:
    if not ADAPTERS:
        return
    held = {id(p) for parameters, _ in parts for p in parameters}
    for adapter in list(ADAPTERS):
        if any(id(p) in held for p in adapter.parameters()):
            adapter.after_step()


def _choose(site: Site, x: Tensor, name: str, state: AdapterState) -> None:
    """Draw from the input of a product, or leave it to what all ranks know."""
    config = state.config
    if ranks.choosing() and config.init not in RANDOM:
        groups = len(site.vectors) if config.vectors == "shared" else 1
        x_TD, dtype = x.reshape(-1, site.features), site.vectors.dtype
        if not ranks.offer(name, x_TD, config.init, groups, dtype):
            _draw(site, None, name, state)
    else:
        _draw(site, x, name, state)


@torch.no_grad()
def _draw(site: Site, x: Tensor | None, name: str, state: AdapterState) -> None:
    config, old = state.config, site.vectors
    groups, size = old.shape
    mask = choose.feature_mask(groups, size, site.features, old.device)
    if config.init in RANDOM or x is None:
        raw = random_vectors(name, site.draws, config, old)
    else:
        x_TD = x.reshape(-1, site.features)
        raw, site.running = vectors_from(x_TD, mask, config, old, site.running)
    site.vectors, valid = choose.normalise(raw, mask, old)
    if not site.drawn and config.init not in RANDOM:
        site.unchecked = valid
    site.drawn, site.due, site.draws = True, False, site.draws + 1


def _belongs(name: str, wanted: tuple[str, ...]) -> bool:
    """Whether a parameter is in one of the attributes (``""``: it is the adapter's own)."""
    return (name.split(".")[0] if "." in name else "") in wanted


def _blank(original: type[nn.Module]) -> CompressedAdapter:
    watch()
    kind = compressed_adapter_class(original)
    return kind.__new__(kind)
