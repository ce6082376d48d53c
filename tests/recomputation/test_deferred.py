"""A deferred tensor is the tensor it stands for, whatever is done with it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from velora_torch.recomputation import recompute, recomputed
from velora_torch.recomputation.deferred import Deferred, plain

D = 6
Use = Callable[[Tensor], Any]


class Consumer(Function):
    """Bypasses ``__torch_function__``, as bitsandbytes' products do."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x * factor

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy * ctx.factor, None


def in_place(h: Tensor) -> Tensor:
    h.mul_(2)
    h += 1
    return h.sin()


def changed_then_custom(h: Tensor) -> Tensor:
    first = Consumer.apply(h, 1.0).detach()
    h.mul_(2)
    second = Consumer.apply(h, 1.0)
    h += 1
    return first + second.detach() + Consumer.apply(h, 3.0)


def changed_without_graph(h: Tensor) -> Tensor:
    with torch.no_grad():
        h.mul_(2)
        total = h.sum()
    return Consumer.apply(h, 1.0) + h + total


def changed_data(h: Tensor) -> Tensor:
    h.data.mul_(2)
    return h * torch.full_like(h, 3.0)


def through_a_view(h: Tensor) -> Tensor:
    flat = h.view(-1)
    h.mul_(3)  # seen through the view
    return flat * torch.arange(flat.numel(), dtype=h.dtype)


def view_changed(h: Tensor) -> Tensor:
    h.view(-1).mul_(3)  # seen in the tensor itself
    return h * h.detach()


def set_item(h: Tensor) -> Tensor:
    h[0] = 0
    return h.exp()


def under_no_grad_first(h: Tensor) -> Tensor:
    with torch.no_grad():
        mean = h.mean()
    return (h - mean).square()


def hooked(h: Tensor) -> Tensor:
    h.register_hook(lambda gradient: 2 * gradient)
    return h * torch.ones_like(h) + F.linear(h, torch.ones(2, h.shape[-1], dtype=h.dtype)).sum()


def many_ways(h: Tensor) -> Tensor:
    ways = [h.tanh(), h * h.cos(), Consumer.apply(h, 2.0), F.linear(h, torch.ones_like(h[0]))]
    return sum(way.sum() for way in ways)


USES: dict[str, Use] = {
    "mul": lambda h: h * torch.linspace(1, 2, h.numel(), dtype=h.dtype).view_as(h),
    "rmul": lambda h: torch.linspace(1, 2, h.numel(), dtype=h.dtype).view_as(h) * h,
    "square": lambda h: h * h,
    "broadcast": lambda h: h * torch.arange(1.0, D + 1, dtype=h.dtype),
    "scalar": lambda h: 3 * h,
    "linear": lambda h: F.linear(h, torch.linspace(-1, 1, 2 * D, dtype=h.dtype).view(2, D)),
    "linear-keywords": lambda h: F.linear(input=h, weight=torch.ones(2, D, dtype=h.dtype)),
    "vector-weight": lambda h: F.linear(h, torch.ones(D, dtype=h.dtype)),
    "matmul": lambda h: h @ torch.ones(D, 2, dtype=h.dtype),
    "addmm": lambda h: torch.addmm(
        torch.ones(2, dtype=h.dtype), h.view(-1, D), torch.ones(D, 2, dtype=h.dtype)
    ),
    "dropout-0": lambda h: F.dropout(h, 0.0) * h,
    "reshape-chunk": lambda h: torch.cat(h.reshape(-1, 2).chunk(2), -1).square(),
    "slice": lambda h: h[..., 1:3].square(),
    "einsum": lambda h: torch.einsum("...d,...d->...", h, h),
    "list": lambda h: torch.stack([h, h.square()]),
    "custom-function": lambda h: Consumer.apply(h, 3.0),
    "in-place": in_place,
    "through-a-view": through_a_view,
    "view-changed": view_changed,
    "set-item": set_item,
    "no-grad-first": under_no_grad_first,
    "hook": hooked,
    "many-ways": many_ways,
    "changed-then-custom": changed_then_custom,
    "changed-without-graph": changed_without_graph,
    "checkpoint": lambda h: checkpoint(lambda t: (t * t.sin()).exp(), h, use_reentrant=False),
    "softmax-in-place": lambda h: F.relu_(h).square(),
    "data": changed_data,
    "out": lambda h: torch.add(h.detach(), 1, out=torch.empty_like(h)).sum() * h,
}


def activation() -> nn.Module:
    act = recompute(nn.Sequential(nn.SiLU()))
    assert recomputed(act)
    return act


def values(act: nn.Module, use: Use, leaf: Tensor) -> tuple[Tensor, Tensor]:
    x = leaf.clone().requires_grad_()
    y = use(act(x * 1.5))
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize("name", USES)
def test_uses(name: str):
    torch.manual_seed(0)
    leaf = torch.randn(2, 4, D, dtype=torch.float64)
    found = values(activation(), USES[name], leaf)
    expected = values(nn.Sequential(nn.SiLU()), USES[name], leaf)
    assert type(found[0]) is Tensor
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["mul", "linear", "addmm", "square"])
def test_double_backward(name: str):
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)

    def penalty(act: nn.Module) -> Tensor:
        y = USES[name](act(x))
        (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(penalty(activation()), penalty(nn.Sequential(nn.SiLU())))


def test_double_backward_reaches_the_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.SiLU(), nn.Linear(D, 3)).double()
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)

    def penalty() -> list[Tensor]:
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, *model.parameters()]))

    expected = penalty()
    recompute(model)
    for ours, theirs in zip(penalty(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def deferred() -> tuple[Deferred, Tensor]:
    x = torch.randn(3, D, requires_grad=True)
    h = activation()(x)
    assert isinstance(h, Deferred)
    return h, F.silu(x)


@pytest.mark.parametrize(
    "ask",
    [
        lambda h: (h.shape, h.size(), h.size(0), h.dim(), h.ndim, len(h), h.numel()),
        lambda h: (h.dtype, h.device, h.layout, h.is_floating_point(), h.element_size()),
        lambda h: (h.requires_grad, h.is_leaf, h.is_contiguous(), h.stride(), h.get_device()),
        lambda h: (torch.is_tensor(h), torch.is_floating_point(h), isinstance(h, Tensor)),
        lambda h: (h.is_cuda, h.is_sparse, h.nbytes, h.itemsize),
    ],
    ids=["sizes", "types", "autograd", "torch", "others"],
)
def test_metadata_costs_nothing(ask: Callable[[Tensor], Any]):
    h, value = deferred()
    h.recipe.compute = None  # computing would fail
    assert ask(h) == ask(value)
    assert h.grad_fn is not None


def test_as_numbers():
    h, value = deferred()
    assert torch.equal(h.detach(), value.detach())
    assert torch.equal(h.cpu(), value)
    assert h.tolist() == value.tolist()
    assert h.detach().numpy().tolist() == value.tolist()
    assert repr(h) == repr(h.plain())
    assert h.argmax().item() == value.argmax().item()
    assert float(h.detach().sum()) == float(value.detach().sum())
    assert torch.equal(pickle.loads(pickle.dumps(h.detach())), value)
    buffer = io.BytesIO()
    torch.save(h.detach(), buffer)
    assert plain(h) is h.plain()
    assert plain(value) is value
    with torch.no_grad():
        assert not (h + 1).requires_grad
    assert h.plain().requires_grad
    with torch.inference_mode():
        assert torch.equal(h + 1, value + 1)


def test_computed_once():
    h, _ = deferred()
    assert h.plain() is h.plain()


def test_gradients_of_the_tensor_itself():
    h, value = deferred()
    for tensor in (h, value):
        tensor.retain_grad()
        (tensor * tensor.detach()).sum().backward()
    assert torch.equal(h.grad, value.grad)


def test_changed_through_a_view_and_given_to_a_custom_function():
    """Autograd cannot be told in time: an error, not a wrong gradient."""
    h, _ = deferred()
    flat = h.reshape(-1).sin_()
    with pytest.raises(RuntimeError, match="through a view"):
        Consumer.apply(h, 1.0)
    assert torch.equal(h.sum(), flat.sum())
    Consumer.apply(h, 1.0)  # noticed by now


def test_writing_behind_the_back_is_an_error():
    h, _ = deferred()
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="write into"):
        h.mul_(2)


def test_a_changed_source_is_an_error():
    g = torch.randn(3, D, requires_grad=True) * 1
    h = activation()(g)
    with torch.no_grad():
        g.zero_()
    with pytest.raises(RuntimeError, match="was changed in place"):
        h.sum()


def test_nothing_is_kept_alive():
    gc.disable()
    try:
        x = torch.randn(3, D, requires_grad=True)
        g = x * 2
        h = activation()(g)
        y = (h * x).sum() + h.sum() + Consumer.apply(h, 1.0).sum()
        y.backward()
        alive = weakref.ref(g), weakref.ref(h)
        del g, h, y
        assert [ref() for ref in alive] == [None, None], "a cycle keeps the tensors"
    finally:
        gc.enable()


def test_checkpointing_frees_the_source():
    """Under gradient checkpointing, no node of the graph holds a tensor of the forward."""
    act, fc = activation(), nn.Linear(D, D)
    alive: list[weakref.ref[Tensor]] = []

    def block(x: Tensor) -> Tensor:
        g = x * 2
        alive.append(weakref.ref(g))
        return fc(act(g) * x) + fc(act(g))

    x = torch.randn(3, D, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=False)
    assert alive[0]() is None
    y.sum().backward()


def test_dispatch_modes():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, D, requires_grad=True)
    with Count():
        h = activation()(x)
        y = (h * x + Consumer.apply(h, 1.0)).sum()
        y.backward()
    assert Count.calls > 5
    leaf = x.detach().clone().requires_grad_()
    value = F.silu(leaf)
    (value * leaf + value * value).sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)


def test_transforms_run_the_original():
    act = activation()
    x = torch.randn(5, D)
    found = torch.func.vmap(torch.func.grad(lambda t: act(t).sum()))(x)
    expected = torch.func.vmap(torch.func.grad(lambda t: F.silu(t).sum()))(x)
    assert torch.equal(found, expected)


def test_compiled_runs_the_original():
    model = recompute(nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D)))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, D)
    compiled(x).square().sum().backward()
    twin(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_given_to_a_compiled_function():
    leaf = torch.randn(4, D, dtype=torch.float64)
    compiled = torch.compile(lambda h: (h * h.sin()).square(), backend="aot_eager")
    found = values(activation(), compiled, leaf)
    expected = values(nn.Sequential(nn.SiLU()), lambda h: (h * h.sin()).square(), leaf)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_module_hooks():
    """Backward hooks of modules wrap outputs in a custom function."""
    model = recompute(nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, 2)))
    seen: list[Any] = []
    for module in model:
        module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
        module.register_full_backward_hook(lambda m, grads, outs: seen.append(outs[0].shape))
    model(torch.randn(3, D, requires_grad=True)).sum().backward()
    assert len(seen) == 6


def test_autocast():
    x = torch.randn(3, D, requires_grad=True)
    linear = nn.Linear(D, 2)
    gradients = []
    for act in (activation(), nn.SiLU()):
        linear.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            h = act(linear.weight.new_ones(D, D) @ x.t())
            y = linear(h.t() * 1) + linear(act(x))
        y.float().square().sum().backward()
        gradients.append([x.grad, linear.weight.grad])
        x.grad = None
    assert h.dtype == torch.bfloat16
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_autocast_may_change_the_type():
    class Cubic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tanh(torch.pow(x, 3.0))  # pow is computed in float32

    x = torch.randn(3, D, dtype=torch.bfloat16, requires_grad=True)
    model = recompute(nn.Sequential(Cubic()))
    with torch.autocast("cpu", torch.bfloat16):
        h, value = model(x), Cubic()(x)
    assert isinstance(h, Deferred)
    assert h.dtype == value.dtype
    assert torch.equal(h.detach(), value.detach())  # outside of autocast by now


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str):
    model = recompute(nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D)))
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert recomputed(twin) == recomputed(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    x = torch.randn(2, D)
    assert torch.equal(twin(x), model(x))
