"""The warning of compress: said once, with the reason, only where nothing is freed."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.tiny_models import gpt2, llama, t5, token_batch
from velora_torch import VeloraConfig, compress, restore
from velora_torch.choosing import _before_forward
from velora_torch.memory import saved_bytes
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.freed import TargetWarning

T, D, G = 20, 16, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.act, self.down = nn.ReLU(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.q(x) + self.k(x) + self.v(x)
        return self.down(self.act(x))


def blocks() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, D), Block(), Block())


def config(*targets: str) -> VeloraConfig:
    return VeloraConfig(targets=targets, num_groups=G)


@contextmanager
def caught() -> Iterator[list[str]]:
    """The warnings of the block."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield texts
    assert all(w.category is TargetWarning for w in found)
    texts += [str(w.message) for w in found]


def reasons(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()[1:-1]]


def hooks(model: nn.Module) -> int:
    return sum(
        len(held)
        for m in model.modules()
        for held in (m._forward_hooks, m._forward_pre_hooks, m._forward_hooks_always_called)
    ) - sum(_before_forward in m._forward_pre_hooks.values() for m in model.modules())


def run(model: nn.Module, x: Tensor | None = None) -> list[str]:
    """The warnings of a training forward."""
    with caught() as texts:
        model.train()(torch.randn(T, D) if x is None else x)
    return texts


# ------------------------------------------------------------------------- in the first forward


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["v"], ["v (2 layers): kept by q, k"]),
        (["v", "k"], ["k (2 layers): kept by q", "v (2 layers): kept by q"]),
        (["1.v"], ["1.v: kept by q, k"]),
        (["down"], ["down (2 layers): kept by act (ReLU)"]),
        (["v", "down"], ["v (2 layers): kept by q, k", "down (2 layers): kept by act (ReLU)"]),
        (["q", "k", "v"], []),
        (["0"], []),
    ],
    ids=lambda value: "+".join(value) if value and "(" not in value[0] else "",
)
def test_the_first_training_forward_tells(targets: list[str], expected: list[str]):
    model = compress(blocks(), config(*targets))
    texts = run(model)
    assert [line for text in texts for line in reasons(text)] == expected
    assert len(texts) == bool(expected)
    assert run(model) == []


def test_who_asks_for_everything_is_not_warned():
    model = compress(blocks(), VeloraConfig(num_groups=G))
    assert hooks(model) == 0
    assert run(model) == []


def test_the_hooks_go_away():
    model = compress(blocks(), config("q", "k", "v"))
    assert hooks(model) == 3  # before, after, and after even if the forward fails
    everywhere = nn.modules.module._global_forward_hooks
    assert not everywhere
    run(model)
    assert hooks(model) == 0
    assert not everywhere


def test_the_warning_is_true():
    """What the message says about bytes, counted."""
    x = torch.randn(T, D)
    counts = {}
    for name in ("v", "q"):
        model = blocks().train()
        with saved_bytes(model) as count:
            model(x)
        plain = count()
        compress(model, config(name, *("k", "v")[: 2 * (name == "q")]))
        warned = bool(run(model))
        with saved_bytes(model) as count:
            model(x)
        counts[warned] = count() - plain
    assert counts == {True: 2 * 4 * T * G, False: 2 * 4 * T * (3 * G - D)}


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, x: model.eval()(x),
        lambda model, x: torch.no_grad()(model.train())(x),
    ],
    ids=["eval", "no_grad"],
)
def test_what_is_no_training_forward(forward: Callable[[nn.Module, Tensor], Any]):
    model = compress(blocks(), config("v"))
    with caught() as texts:
        forward(model, torch.randn(T, D))
    assert texts == []
    assert len(run(model)) == 1


def test_a_failed_forward_is_none():
    model = compress(blocks(), config("v"))
    with pytest.raises(RuntimeError):
        model.train()(torch.randn(T, D + 1))
    assert not nn.modules.module._global_forward_hooks
    assert len(run(model)) == 1


class Returns(nn.Module):
    """Gives what its layers read to the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, *, also: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.first(x if also is None else also)
        return {"out": self.second(hidden), "hidden": hidden}


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_what_the_caller_holds_is_no_reason(keyword: bool):
    model = compress(Returns(), config("first", "second")).train()
    x = torch.randn(T, D, requires_grad=True)
    with caught() as texts:
        model(torch.ones(1), also=x * 1) if keyword else model(x * 1)
    assert texts == []
    assert hooks(model) == 0


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x) + 1
        return self.down(hidden) * hidden


def test_an_operator_of_the_parent():
    (text,) = run(compress(Gated(), config("down")))
    assert reasons(text) == ["down: kept by code outside of the layers"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_holds_nothing(reentrant: bool):
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.blocks, x, use_reentrant=reentrant)

    model = compress(Region(), config("v"))
    assert run(model, torch.randn(T, D, requires_grad=True)) == []


def test_the_watch_holds_nothing():
    model = compress(blocks(), config("v", "down"))
    gc.disable()
    try:
        seen: list[Any] = []
        model[1].q.register_forward_pre_hook(lambda m, args: seen.append(args[0].untyped_storage()))
        import weakref

        with caught():
            y = model.train()(torch.randn(T, D))
        alive = weakref.ref(seen.pop())
        assert alive() is not None
        y.sum().backward()
        del y
        assert alive() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------ copies and undoing


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copied, pickled])
def test_a_copy_watches_for_itself(how: Callable[[nn.Module], nn.Module]):
    model = compress(blocks(), config("v"))
    other = how(model)
    assert len(run(other)) == 1
    assert hooks(other) == 0
    assert hooks(model) == 3
    assert len(run(model)) == 1


def test_restore_stops_watching():
    model = restore(compress(blocks(), config("v")))
    assert hooks(model) == 0
    assert run(model) == []


def test_hooks_of_others_stay():
    model = blocks()
    calls: list[str] = []
    model.register_forward_hook(lambda *a: calls.append("after"))
    model.register_forward_pre_hook(lambda *a: calls.append("before"))
    compress(model, config("v"))
    run(model)
    assert hooks(model) == 2
    run(restore(model))
    assert calls == ["before", "after"] * 2


def test_compiled_forwards_are_not_watched():
    model = compress(blocks(), config("v")).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with caught() as texts:
        compiled(torch.randn(T, D)).sum().backward()
    assert texts == []
    assert len(run(model)) == 1


def test_a_part_of_the_model_may_be_called_alone():
    model = compress(blocks(), config("v"))
    assert run(model[1]) == []
    assert len(run(model)) == 1


def test_outputs_and_gradients_are_the_same():
    x = torch.randn(T, D)
    results = []
    for quiet in (True, False):
        torch.manual_seed(3)
        model = compress(blocks(), config("v", "down"))
        if quiet:
            restore(copy.deepcopy(model))
            model._forward_hooks.clear()
            model._forward_pre_hooks.clear()
        with caught():
            model.train()(x).square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ----------------------------------------------------------------------- before the first batch


@pytest.mark.parametrize(
    ("make", "targets", "expected"),
    [
        (llama, ["v_proj", "down_proj"], ["v_proj (2 layers): kept by q_proj, k_proj"]),
        (
            lambda: llama(layers=5),
            ["v_proj", "gate_proj"],
            ["v_proj (5 layers): kept by q_proj, k_proj", "gate_proj (5 layers): kept by up_proj"],
        ),
        (llama, ["q_proj", "k_proj", "v_proj", "down_proj"], []),
        (
            t5,
            ["SelfAttention.v"],
            [
                "encoder.block.*.layer.*.SelfAttention.v (2 layers): kept by q, k",
                "decoder.block.*.layer.*.SelfAttention.v (2 layers): kept by q, k",
            ],
        ),
        (gpt2, ["attn.c_proj"], ["c_proj (2 layers): kept by GPT2Attention"]),
    ],
    ids=["value", "more-blocks", "all-of-them", "t5", "gpt2"],
)
def test_transformers_are_told_at_once(make: Any, targets: list[str], expected: list[str]):
    model = make()
    with caught() as texts:
        compress(model, config(*targets))
    assert [line for text in texts for line in reasons(text)] == expected
    assert len(texts) == bool(expected)
    if expected:
        assert hooks(model) == 0


def test_an_error_leaves_the_model_plain():
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TargetWarning):
            compress(model, config("v_proj"))
    assert all(p.requires_grad for p in model.parameters())
    assert not any("velora" in name for name, _ in model.named_buffers())
    with caught():
        compress(model, config("v_proj"))


def test_transformers_without_sharing_are_watched():
    model = compress(gpt2(), config("mlp.c_proj"))
    assert hooks(model) == 3
    with caught() as texts:
        model.train()(**token_batch())
    assert texts == []


def test_what_a_dummy_batch_cannot_tell_is_watched():
    model = llama()
    model.model.register_forward_pre_hook(lambda m, args: 1 / 0)
    compress(model, config("v_proj"))
    assert hooks(model) == 4


def test_simulations_are_not_warned():
    world = FakeWorld()
    model = world.model(llama())
    with world:
        compress(model, config("v_proj"))
    assert hooks(model) == 0
