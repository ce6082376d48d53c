"""compress refuses what it cannot do, says why, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from velora_torch import VeloraConfig, compress
from velora_torch.layers import CompressedLayer

from .anatomy import anatomy, assert_same, weights
from .tiny_models import Net, batches, net, train

CONFIG = VeloraConfig(num_groups=4)


def assert_unchanged(model: nn.Module, config: Any, message: str, kind: type[Exception]) -> None:
    before, values = anatomy(model), weights(model)
    grads = {n: p.grad for n, p in model.named_parameters()}
    with pytest.raises(kind, match=message):
        compress(model, config)
    assert anatomy(model) == before
    assert_same(values, weights(model))
    assert all(p.grad is grads[n] for n, p in model.named_parameters())


def refuse(name: str, module: nn.Module) -> bool:
    if name == "second":
        raise RuntimeError("no second")
    return True


def frozen_net() -> Net:
    return net().requires_grad_(False)


def coefficient_net() -> Net:
    model = net()
    model.second.register_buffer("coef", torch.zeros(1))
    return model


@pytest.mark.parametrize(
    ("make", "config", "kind", "message"),
    [
        (net, {"num_groups": 4}, TypeError, "config must be a VeloraConfig, got dict"),
        (net, "all-linear", TypeError, "config must be a VeloraConfig, got str"),
        (net, VeloraConfig(targets=["frist"]), ValueError, "'frist' matches no layer; nearest: fi"),
        (
            net,
            VeloraConfig(targets=["first"], num_groups=17),
            ValueError,
            "num_groups=17 is larger than the 16 input features of layer 'first'; use at most 16",
        ),
        (
            net,
            VeloraConfig(num_groups=64),
            ValueError,
            r"leaves nothing to compress:\n  first: num_groups=64 is larger than the 16 input",
        ),
        (
            net,
            VeloraConfig(targets=["first", "second"], num_groups={"first": 4}),
            ValueError,
            "num_groups has no entry for layer 'second'; it names 'first'. Add the layer, or a 'de",
        ),
        (net, VeloraConfig(targets=["norm"]), ValueError, "norm: LayerNorm is not a linear layer"),
        (frozen_net, VeloraConfig(), ValueError, "first: frozen: keeps no input"),
        (nn.ReLU, VeloraConfig(), ValueError, "the model has no layer with parameters"),
        (
            net,
            VeloraConfig(targets=lambda name, module: False),
            ValueError,
            "leaves nothing to compress:\n  it asks for none of the 3 layers with parameters",
        ),
        (net, VeloraConfig(targets=refuse, num_groups=4), RuntimeError, "no second"),
        (
            coefficient_net,
            VeloraConfig(num_groups=4),
            ValueError,
            "layer 'second' has an attribute 'coef' of its own, .*leave the layer out of targets",
        ),
    ],
)
def test_a_failing_compress_says_why_and_changes_nothing(
    make: Callable[[], nn.Module], config: Any, kind: type[Exception], message: str
) -> None:
    assert_unchanged(make(), config, message, kind)


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_error_half_way_changes_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    handle = model.first.register_forward_hook(lambda *_: None)
    model(batches(1)[0]).sum().backward()
    start = CompressedLayer.start

    def fail(layer: CompressedLayer, name: str, *rest: Any) -> None:
        if name == "first" or place == "after":
            start(layer, name, *rest)
        if name == "second":
            raise MemoryError("no more memory")

    monkeypatch.setattr(CompressedLayer, "start", fail)
    assert_unchanged(model, CONFIG, "no more memory", MemoryError)
    monkeypatch.undo()
    handle.remove()
    assert not model.first._forward_hooks
    train(model, batches(2))  # the watcher of optimizers has forgotten both layers
    compress(model, CONFIG)


def test_compress_in_inference_mode_changes_nothing() -> None:
    model = net()
    message = r"compress makes parameters.*call it outside of torch.inference_mode\(\)"
    with torch.inference_mode():
        assert_unchanged(model, CONFIG, message, RuntimeError)


def test_a_compressed_model_is_not_compressed_again() -> None:
    model = compress(net(), CONFIG)
    message = r"compressed already \(2 layers, the first is 'first'\); call velora_torch.restore"
    assert_unchanged(model, CONFIG, message, ValueError)


def test_config_is_optional() -> None:
    model = compress(nn.Linear(64, 2))
    assert isinstance(model, CompressedLayer)
    assert model.velora.groups == 32
