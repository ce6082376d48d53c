"""Bytes counted on real tensors, against sums done by hand."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.memory import StepBytes, measure_step, saved_bytes
from velora_torch.memory.count import optimizer_state_bytes, unique_bytes, weight_tensors

T, D, H, O, G = 20, 16, 32, 8, 4  # noqa: E741


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, O))


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters()) * 4


def test_saved_bytes_of_a_plain_model():
    model, x = mlp(), torch.randn(T, D)
    with saved_bytes(model) as count:
        assert count() == 0
        y = model(x)
    assert y.shape == (T, O)
    # The input, and ReLU's output, which ReLU and the second layer share.
    assert count() == 4 * T * (D + H)


def test_a_shared_storage_counts_once():
    model = nn.ModuleList([nn.Linear(D, H) for _ in range(3)])
    x = torch.randn(T, D)
    with saved_bytes(model) as count:
        total = sum(layer(x[:, :]).sum() for layer in model)
    assert isinstance(total, Tensor)
    assert count() == 4 * T * D


def test_a_slice_holds_its_whole_storage():
    layer = nn.Linear(D, H)
    whole = torch.randn(3 * T, D)
    with saved_bytes(layer) as count:
        layer(whole[:T])
    assert count() == 4 * 3 * T * D


def test_saved_bytes_of_a_compressed_model():
    model, x = mlp(), torch.randn(T, D)
    velora_torch.compress(model, VeloraConfig(num_groups=G))
    for _ in range(2):  # the first forward draws vectors: they are no activation
        with saved_bytes(model) as count:
            model(x)
        assert count() == 4 * T * (G + H + G)


def test_dense_vectors_are_no_activation():
    model, x = nn.Sequential(nn.Linear(D, O)), torch.randn(T, D)
    velora_torch.compress(model, VeloraConfig(num_groups=G, gradient="dense"))
    for _ in range(2):
        with saved_bytes(model) as count:
            model(x)
        assert count() == 4 * T * G


def test_counting_changes_no_gradient():
    model, x = nn.Sequential(nn.Linear(D, H), nn.Sigmoid()), torch.randn(T, D)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with saved_bytes(model):
        y = model(x)
    y.square().sum().backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert gradient is not None
        assert torch.equal(p.grad, gradient)


def test_counting_leaks_no_graph():
    model, x = nn.Sequential(nn.Linear(D, H), nn.Sigmoid()), torch.randn(T, D)
    gc.disable()
    try:
        with saved_bytes(model) as count:
            y = model(x)  # Sigmoid keeps its own output
        alive = weakref.ref(y)
        del y, count
        assert alive() is None, "a cycle keeps the graph"
    finally:
        gc.enable()


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_measure_step(compressed: bool):
    model, x = mlp(), torch.randn(T, D)
    if compressed:
        velora_torch.compress(model, VeloraConfig(num_groups=G, track_delta=False))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    before = [p.detach().clone() for p in trainable]
    for p in trainable:
        p.grad = torch.ones_like(p)  # cleared first
    step = measure_step(model, lambda: model(x).sum(), optimizer)

    numbers = sum(p.numel() for p in trainable)
    held = weights(model) + 4 * sum(b.numel() for b in model.buffers())
    saved = 4 * T * (G + H + G if compressed else D + H)
    counters = 4 * len(trainable)  # AdamW's `step`
    assert step == StepBytes(held, saved, 4 * numbers, 8 * numbers + counters)
    assert all(p.grad is None for p in trainable)
    if compressed:
        assert numbers == (H + O) * (G + 1)
    assert any(not torch.equal(p, b) for p, b in zip(trainable, before, strict=True))


class Cubed(nn.Module):
    """Keeps several tensors of the input's size."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid() * x


def test_what_a_backward_pass_computes_again_does_not_count():
    model = nn.Sequential(nn.Linear(D, H), Cubed(), nn.Linear(H, 1))
    velora_torch.recompute(model)
    with saved_bytes(model) as count:
        loss = model(torch.randn(T, D)).sum()
        before = count()
        loss.backward()
        assert count() == before > 0


def test_measure_step_without_optimizer():
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    step = measure_step(model, lambda: model(torch.randn(T, D)).sum())
    assert step.optimizer_state == 0
    assert step.gradients == weights(model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert step.to_dict() == {
        "weights": weights(model),
        "saved_activations": 4 * T * (D + H),
        "gradients": weights(model),
        "optimizer_state": 0,
    }


def test_optimizer_state_counts_shared_tensors_once():
    parameter = nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([parameter], 0.1)
    shared = torch.zeros(6)
    optimizer.state[parameter] = {"a": shared, "b": shared, "c": torch.zeros(2), "step": 3}
    assert optimizer_state_bytes(optimizer) == 4 * 8


def test_parts_of_quantised_weights_count() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32)
    double = bitsandbytes.nn.Linear4bit(
        64, 128, bias=False, compute_dtype=torch.float32, compress_statistics=False
    )
    for module in (layer, double):
        module.to("cpu")
        module.weight = module.weight.cpu()
    packed = layer.weight.numel()
    kept = sum(t.untyped_storage().nbytes() for t in weight_tensors(double)) - packed
    assert kept >= 4 * 64 * 128 // 64  # an absmax in float32 for 64 weights
    assert unique_bytes(weight_tensors(layer)) > packed


def test_tensors_inside_of_an_optimizers_objects_count() -> None:
    class Projector:
        def __init__(self) -> None:
            self.basis = torch.zeros(6, 2)

    weight = nn.Parameter(torch.zeros(6, 6))
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight] = {"step": 1, "moment": torch.zeros(2, 6), "projector": Projector()}
    assert optimizer_state_bytes(optimizer) == 4 * (12 + 12)
