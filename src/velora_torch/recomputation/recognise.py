"""Which modules are norms and activations: found out by running them, not by their names."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.recomputation.replay import replay
from velora_torch.values import has_values

PROBING_ERRORS = (TypeError, RuntimeError, ValueError, IndexError)
"""What a module raises that needs other inputs than one tensor (or another device)."""

_REGISTRIES = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType)
_FOUND: dict[tuple[Any, ...], Finding] = {}

Run = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Finding:
    """What a module is: ``"norm"``, ``"activation"``, or neither and why not."""

    kind: str | None
    reason: str = ""


def is_candidate(module: nn.Module) -> bool:
    """Whether a module may be a norm or an activation: a leaf with vectors of one length, or none.

    Modules without a forward (lists, dictionaries) are none.
    """
    if next(module.children(), None) is not None:
        return False
    if type(module).forward is nn.Module.forward:
        return False
    parameters = [p for p in module._parameters.values() if p is not None]
    return all(p.dim() == 1 for p in parameters) and len({len(p) for p in parameters}) <= 1


def inspect(module: nn.Module) -> Finding:
    """Run a candidate on small inputs: what it is, and whether there is anything to gain.

    The module itself is not run, nor changed; neither is torch's random state. Modules without
    numbers of their own, as in a simulation, are run once for each class and its settings.
    """
    if "forward" in module.__dict__:
        return Finding(None, "its forward was replaced on this instance")
    key = _decisive(module)
    if key is None:
        return _inspect(module)
    if key not in _FOUND:
        _FOUND[key] = _inspect(module)
    return _FOUND[key]


def _decisive(module: nn.Module) -> tuple[Any, ...] | None:
    """All that decides how a module behaves; ``None`` where its numbers or other objects may."""
    tensors = [*module._parameters.items(), *module._buffers.items()]
    if any(t is not None and has_values(t) for _, t in tensors):
        return None
    settings = {key: value for key, value in vars(module).items() if key not in _REGISTRIES}
    if not all(isinstance(value, _PLAIN) for value in settings.values()):
        return None
    layout = [(n, t if t is None else (t.shape, t.dtype, t.requires_grad)) for n, t in tensors]
    return type(module), type(module).forward, tuple(settings.items()), tuple(layout)


def _inspect(module: nn.Module) -> Finding:
    devices = sorted({p.device for p in module.parameters() if p.is_cuda}, key=str)
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            kind, reason = _behaviour(module)
            if kind is None:
                return Finding(None, reason)
            reason = _no_gain(module, kind)
        except PROBING_ERRORS as error:
            first = str(error).strip().partition("\n")[0]
            return Finding(None, f"cannot be run on one tensor alone: {first}")
    return Finding(None, reason) if reason else Finding(kind)


def _behaviour(module: nn.Module) -> tuple[str | None, str]:
    """``"norm"`` or ``"activation"``, by what a float64 copy does; otherwise the reason."""
    twin = _twin(module, torch.float64, torch.device("cpu"))
    parameters = list(twin.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    run: Run = lambda x: type(module).forward(twin, x)  # noqa: E731
    features = len(parameters[0]) if parameters else 8
    x = _numbers((2, 3, features), torch.float64).requires_grad_() * 1.0  # not a leaf
    before, state = x.detach().clone(), _state(twin)
    twin.training = True
    y = run(x)
    reason = _not_a_function(x, before, y)
    if reason is None and not _same(run(x), y):
        reason = "gives another result each time"
    if reason is None:
        run(_numbers((2, 3, features), torch.float64).neg() * 3)
        twin.training = False
        if not _same(run(x), y):
            reason = "depends on what it was called with before, or on training or evaluation"
        twin.training = True
    if reason is None and not _unchanged(state, _state(twin)):
        reason = "changes its own state"
    if reason is not None:
        return None, reason
    kind = _elementwise_or_rows(run, x.detach(), y.detach(), bool(parameters))
    if kind is None:
        return None, "is neither elementwise nor works on each row alone"
    return kind, "" if _replays(run, twin, x, y) else "its gradients are not reproducible"


def _not_a_function(x: Tensor, before: Tensor, y: Any) -> str | None:
    """Why x -> y is not a function from a tensor to a new one of the same shape."""
    if not isinstance(y, Tensor):
        return "does not return a tensor"
    if y.shape != x.shape or y.dtype != x.dtype:
        return "its output has another shape or type than its input"
    if not torch.equal(x.detach(), before):
        return "changes its input in place"
    if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return "returns its input, or a view of it"
    if not y.requires_grad:
        return "its output does not depend on its input in a differentiable way"
    return None


def _elementwise_or_rows(run: Run, x: Tensor, y: Tensor, parameters: bool) -> str | None:
    if not parameters:
        order = torch.arange(x.numel() - 1, -1, -1)
        try:
            flat = run(x.flatten()[order])
            elementwise = _same(flat, y.flatten()[order]) and run(x.new_empty(0)).shape == (0,)
        except PROBING_ERRORS:  # an operator on rows may refuse a single one
            elementwise = False
        if elementwise:
            return "activation"
    order = torch.tensor([4, 0, 5, 2])
    rows = run(x.flatten(0, 1)[order])
    return "norm" if _same(rows, y.flatten(0, 1)[order]) else None


def _replays(run: Run, twin: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether running it again gives the gradients of the first time."""
    grad = _numbers(tuple(y.shape), y.dtype).flip(0)
    wanted = [x, *twin.parameters()]
    first = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    with torch.no_grad():
        (again,) = replay(run, [x], [True], grad)
    second = torch.autograd.grad(run(x), wanted, grad, allow_unused=True)
    pairs = [*zip(first, second, strict=True), (first[0], again)]
    return all(a is b is None or _same(a, b) for a, b in pairs)


def _no_gain(module: nn.Module, kind: str) -> str:
    """Why recomputing would keep no less; empty if it would keep less.

    Counts what autograd keeps on the module's own device and in its own type.
    """
    like = next(iter([*module.parameters(), *module.buffers()]), None)
    dtype = torch.get_default_dtype() if like is None else like.dtype
    real = like is not None and has_values(like)
    device = like.device if like is not None and real else torch.device("cpu")
    twin = _twin(module, dtype, device)
    for copied, own in zip(twin.parameters(), module.parameters(), strict=True):
        copied.requires_grad_(own.requires_grad)
    features = len(next(iter(twin.parameters()), range(8)))
    x = _numbers((2, 3, features), dtype).to(device).requires_grad_()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        kept[alias.untyped_storage().data_ptr()] = alias
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = type(module).forward(twin, x)
    # Either its input or its output is kept anyhow: of a norm by itself, and the output of an
    # activation by the operator that follows.
    address = x.untyped_storage().data_ptr()
    free = x if kind == "norm" and address in kept else y
    for tensor in [*twin.parameters(), *twin.buffers(), free]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    extra = sum(t.untyped_storage().nbytes() for t in kept.values())
    if kind == "activation":
        return "" if extra else "keeps its output alone, which the next operator can share"
    few = extra < x.untyped_storage().nbytes() / 2
    return "keeps little but its input, or its output alone, already" if few else ""


def _twin(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy with made-up parameters and without hooks, also where the module has no numbers."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        numbers = _numbers(tuple(parameter.shape), dtype).to(device)
        memo[id(parameter)] = nn.Parameter(1 + 0.25 * numbers)
    for buffer in module.buffers():
        kind = dtype if buffer.is_floating_point() else buffer.dtype
        if not has_values(buffer):
            memo[id(buffer)] = torch.ones(buffer.shape, dtype=kind, device=device)
        else:
            memo[id(buffer)] = buffer.detach().to(device, kind, copy=True)
    twin = type(module).__new__(type(module))
    hooks = set(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        if name not in hooks:
            vars(twin)[name] = copy.deepcopy(value, memo)
    return twin


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers without order between -2 and 2, the same each time, without a random generator."""
    count = torch.Size(shape).numel()
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    return (2 * torch.sin(steps * steps + 0.5)).reshape(shape).to(dtype)


def _same(a: Any, b: Any) -> bool:
    """Equal but for rounding: the module may compute in float32, and in another order."""
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    )


def _state(module: nn.Module) -> dict[str, Any]:
    """Attributes, with copies of those that can be changed."""
    state = {k: v for k, v in vars(module).items() if k not in ("training", "_buffers")}
    state |= {f"buffer {k}": v for k, v in module._buffers.items()}
    return {
        name: copy.copy(value) if isinstance(value, (list, dict, set)) else _copied(value)
        for name, value in state.items()
    }


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(value, after[name])
        if isinstance(value, Tensor)
        else value is after[name] or value == after[name]
        for name, value in before.items()
    )
