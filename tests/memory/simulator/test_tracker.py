"""The tracker on hand-made sequences, with known births, deaths and categories."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.simulator.tracker import BLOCK, Tracker

T, D, H, O, G = 24, 16, 32, 8, 4  # noqa: E741
KIB = 1024


def floats(kib: int) -> Tensor:
    return torch.empty(kib * KIB // 4)


def rounded(*counts: int) -> int:
    """Bytes of tensors of so many floats."""
    return sum(-(-4 * count // BLOCK) * BLOCK for count in counts)


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H, bias), nn.ReLU(), nn.Linear(H, O, bias))


def sizes(model: nn.Module) -> list[int]:
    return [p.numel() for p in model.parameters()]


# ------------------------------------------------------------------ births and deaths


def test_a_peak_is_the_largest_moment():
    with Tracker() as tracker:
        with tracker.phase("forward"):
            a = floats(4)
            b = floats(8)
            del a
            c = floats(2)
        del b, c
        with tracker.phase("backward"):
            floats(1)
    assert tracker.peaks["forward"].total == 12 * KIB
    assert tracker.peaks["backward"].total == KIB
    assert sum(tracker.totals().values()) == 0


@pytest.mark.parametrize("count", [1, 127, 128, 129, 1000])
def test_storages_take_blocks_of_512_bytes(count: int):
    with Tracker() as tracker:
        kept = torch.empty(count)
    assert sum(tracker.totals().values()) == rounded(count)
    assert kept.numel() == count


def test_a_layout_on_the_meta_device_takes_nothing():
    """Deferred tensors have one as large as their value."""
    tracker = Tracker()
    with tracker, tracker.phase("forward"):
        layout = torch.empty(1000, 1000, device="meta")
        layout = layout.view(-1)[:-1]
    assert sum(tracker.totals().values()) == 0


def test_an_empty_storage_takes_nothing():
    with Tracker() as tracker:
        kept = torch.empty(0, 7)
    assert sum(tracker.totals().values()) == 0
    assert kept.numel() == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.view(-1, 4),
        lambda x: x.t(),
        lambda x: x[:1],
        lambda x: x.detach(),
        lambda x: x.add_(1),
        lambda x: x.chunk(2),
        lambda x: torch.mul(x, 2, out=x),
    ],
    ids=["view", "transpose", "slice", "detach", "in-place", "chunks", "out"],
)
def test_views_and_changes_in_place_take_nothing(make: Callable[[Tensor], Any]):
    with Tracker() as tracker:
        x = torch.zeros(32, 32)
        y = make(x)
        assert sum(tracker.totals().values()) == 4 * KIB
        del x
        assert sum(tracker.totals().values()) == 4 * KIB  # the view holds it
        del y
        assert sum(tracker.totals().values()) == 0


def test_the_tracker_keeps_nothing_alive():
    gc.disable()
    try:
        model = mlp()
        tracker = Tracker()
        with tracker.watch(model), tracker, tracker.phase("forward"):
            x = torch.randn(T, D)
            y = model(x)
            result, saved = weakref.ref(y), weakref.ref(x.untyped_storage())
            del x
            assert saved() is not None  # by the graph
            del y
            assert result() is None
            assert saved() is None
        storage = weakref.ref(model[0].weight.untyped_storage())
        del model
        assert storage() is None
        ended = weakref.ref(tracker)
        left = floats(1)
        del tracker
        assert ended() is None, "a storage that outlives the tracker holds it"
        assert left.numel()
    finally:
        gc.enable()


def test_a_storage_may_outlive_the_tracker():
    with Tracker() as tracker:
        kept = floats(1)
    del tracker
    gc.collect()
    del kept  # its death is nobody's business any more


# ------------------------------------------------------------------ categories


def test_a_new_label_holds_for_past_peaks_in_which_the_block_was_alive():
    tracker = Tracker()
    with tracker:
        with tracker.phase("early"):
            floats(1)
        with tracker.phase("forward"):
            saved = floats(4)
            floats(2)
        assert tracker.peaks["early"].by_category()["temporary"] == KIB
        # Saved is alive when the forward pass has ended; what died in it is a temporary.
        peak = tracker.peaks["forward"].by_category()
        assert (peak["saved_activations"], peak["temporary"]) == (4 * KIB, 2 * KIB)
        assert tracker.saved == 4 * KIB
    assert tracker.peaks["early"].by_category()["saved_activations"] == 0
    for peak in tracker.peaks.values():
        assert sum(peak.parts) == peak.total
    assert saved.numel()


def test_a_label_does_not_reach_peaks_before_its_birth():
    tracker = Tracker()
    model = nn.Linear(D, H, bias=False)
    with tracker.watch(model), tracker:
        with tracker.phase("a"):
            floats(64)
            tracker.note_weights(model)
        peak = tracker.peaks["a"].by_category()
        with tracker.phase("b"):
            late = nn.Linear(D, H, bias=False)
        tracker.note_weights(late)
    assert tracker.peaks["a"].by_category() == peak
    assert peak == dict.fromkeys(peak, 0) | {"weights": rounded(D * H), "temporary": 64 * KIB}
    assert tracker.peaks["b"].by_category()["weights"] == rounded(D * H, D * H)


def test_logits_are_known_by_their_width():
    with Tracker(vocab=100) as tracker:
        kept = [torch.empty(8, 100), torch.empty(8, 101), torch.empty(100), torch.empty(2, 4, 100)]
    totals = tracker.totals()
    assert totals["logits"] == rounded(800, 800)
    assert totals["temporary"] == rounded(808, 100)
    assert len(kept) == 4


@pytest.mark.parametrize("frozen", [False, True], ids=["all-trained", "first-frozen"])
def test_a_step_by_category(frozen: bool):
    model, x = mlp(), torch.randn(T, D)
    if frozen:
        model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, foreach=False)
    tracker = Tracker()
    with tracker.watch(model, [x]), tracker:
        assert tracker.totals()["weights"] == rounded(*sizes(model))
        with tracker.phase("forward"):
            loss = model(x).sum()
        hidden = T * H  # ReLU's output, which the second layer saves too
        assert tracker.saved == rounded(T * D, hidden, 1)
        with tracker.phase("backward"):
            loss.backward()
        counts = [p.numel() for p in trained]
        assert tracker.totals()["gradients"] == rounded(*counts)
        with tracker.phase("optimizer"):
            optimizer.step()
        tracker.note_states(optimizer)
        steps = [1] * len(counts)
        assert tracker.totals()["optimizer_state"] == rounded(*counts, *counts, *steps)
        model.zero_grad(set_to_none=True)
        assert tracker.totals()["gradients"] == 0
    assert all(sum(peak.parts) == peak.total for peak in tracker.peaks.values())


def test_gradients_that_accumulate_count_once():
    model, x = mlp(), torch.randn(T, D)
    tracker = Tracker()
    with tracker.watch(model), tracker:
        for _ in range(3):
            with tracker.phase("backward"):
                model(x).sum().backward()
            assert tracker.totals()["gradients"] == rounded(*sizes(model))


def test_tied_weights_count_once():
    first, second = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
    second.weight = first.weight
    model, x = nn.Sequential(first, second), torch.randn(T, D)
    tracker = Tracker()
    with tracker.watch(model), tracker, tracker.phase("backward"):
        model(x).sum().backward()
        assert tracker.totals()["weights"] == rounded(D * D)
        assert tracker.totals()["gradients"] == rounded(D * D)


def test_what_a_recomputation_keeps_is_a_saved_activation():
    inner, x = nn.Sequential(nn.Linear(D, H), nn.Sigmoid(), nn.Linear(H, D)), torch.randn(T, D)
    x.requires_grad_(True)
    tracker = Tracker()
    with tracker.watch(inner, [x]), tracker:
        with tracker.phase("forward"):
            loss = checkpoint(inner, x, use_reentrant=False).sum()
        assert tracker.saved == rounded(T * D, 1)
        with tracker.phase("backward"):
            loss.backward()
    peak = tracker.peaks["backward"].by_category()
    assert peak["saved_activations"] == rounded(T * D, 1, T * H)


def test_hooks_are_gone_afterwards():
    model = mlp()
    before = [len(nn.modules.module._global_forward_hooks), len(model[0]._forward_hooks)]
    tracker = Tracker()
    with pytest.raises(ZeroDivisionError), tracker.watch(model), tracker:
        1 / 0  # noqa: B018
    assert [len(nn.modules.module._global_forward_hooks), len(model[0]._forward_hooks)] == before
    model(torch.randn(T, D)).sum().backward()
    assert tracker.totals()["gradients"] == 0


# ------------------------------------------------------------------ operations


def flops_of(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[Tracker, int]:
    counter = FlopCounterMode(display=False)
    with counter:
        run(x).sum().backward()
    tracker = Tracker()
    with tracker.watch(model, [x]), tracker:
        with tracker.phase("forward"):
            loss = run(x).sum()
        with tracker.phase("backward"):
            loss.backward()
    return tracker, counter.get_total_flops()


FIRST, SECOND = 2 * T * D * H, 2 * T * H * O
"""Operations of the two products of ``mlp``."""


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("needs_dx", [True, False], ids=["dX", "no-dX"])
def test_operations_of_an_mlp(needs_dx: bool, bias: bool):
    model = mlp(bias)
    tracker, total = flops_of(model, torch.randn(T, D, requires_grad=needs_dx), model)
    flops = tracker.flops
    assert flops.forward == FIRST + SECOND
    assert flops.input_gradients == SECOND + (FIRST if needs_dx else 0)
    assert flops.weight_gradients == FIRST + SECOND
    assert flops.recompute == 0
    assert flops.total == total


def test_operations_of_factored_layers():
    """dW becomes C = dYᵀ z: G columns instead of D."""
    model = velora_torch.compress(mlp(), VeloraConfig(num_groups=G))
    x = torch.randn(T, D, requires_grad=True)
    model(x)  # draws vectors, which is no part of a usual step
    tracker, total = flops_of(model, x, model)
    projections = 2 * T * D + 2 * T * H  # z = x v
    assert tracker.flops.forward == FIRST + SECOND + projections
    assert tracker.flops.input_gradients == FIRST + SECOND
    assert tracker.flops.weight_gradients == (FIRST // D + SECOND // H) * G
    assert tracker.flops.total == total


def test_operations_of_a_frozen_layer():
    model = mlp()
    model[0].requires_grad_(False)
    tracker, total = flops_of(model, torch.randn(T, D, requires_grad=True), model)
    assert tracker.flops.weight_gradients == SECOND
    assert tracker.flops.input_gradients == FIRST + SECOND
    assert tracker.flops.total == total


def test_operations_of_a_recomputation():
    model = mlp()

    def run(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(model, x, use_reentrant=False)
        return result

    tracker, total = flops_of(model, torch.randn(T, D, requires_grad=True), run)
    # The last product saves only its input, so it does not run again.
    assert tracker.flops.recompute == FIRST
    assert tracker.flops.forward == FIRST + SECOND
    assert tracker.flops.input_gradients == FIRST + SECOND
    assert tracker.flops.weight_gradients == FIRST + SECOND
    assert tracker.flops.total == total


def test_operations_of_attention():
    """What torch counts on a GPU: two products forward, five backward."""
    heads, size = 2, 8
    model = nn.MultiheadAttention(heads * size, heads, batch_first=True)

    def run(x: Tensor) -> Tensor:
        result: Tensor = model(x, x, x, need_weights=False)[0]
        return result

    tracker, on_cpu = flops_of(model, torch.randn(3, T, heads * size, requires_grad=True), run)
    linear = 2 * (3 * T) * 4 * (heads * size) ** 2
    product = 2 * 3 * heads * T * T * size
    assert tracker.flops.forward == linear + 2 * product
    assert tracker.flops.input_gradients == linear + 5 * product
    assert tracker.flops.weight_gradients == linear
    assert tracker.flops.total == on_cpu + 7 * product  # torch leaves out attention on the CPU


# ------------------------------------------------------------------ fake tensors


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "velora"])
def test_fake_and_real_tensors_count_alike(compressed: bool):
    results = []
    for fake in (False, True):
        model, x = mlp(), torch.randn(T, D, requires_grad=True)
        if compressed:
            velora_torch.compress(model, VeloraConfig(num_groups=G, init="random"))
        world = FakeWorld()
        if fake:
            model, x = world.model(model), world.tensor(x)
        with world if fake else nullcontext():
            tracker, _ = flops_of(model, x, model)
        peaks = {name: (peak.total, peak.parts) for name, peak in tracker.peaks.items()}
        results.append((peaks, vars(tracker.flops), tracker.saved, tracker.totals()))
    assert results[0] == results[1]
    assert results[0][2] > 0
