"""Steps under the tracker: fake tensors hold what real ones hold, segment by segment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.blocks import repeated_blocks
from velora_torch.memory.count import measure_step
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.simulator.four_bit import layer_bytes
from velora_torch.memory.simulator.setup import Setup
from velora_torch.memory.simulator.steps import Trace, track
from velora_torch.memory.simulator.tracker import BLOCK

from ... import tiny_models

pytest.importorskip("transformers")
# PEFT asks transformers under a name that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


def velora(**fields: Any) -> VeloraConfig:
    return VeloraConfig(**({"sub_token_size": 4} | fields))


SETUPS = {
    "full": Setup(),
    "sgd": Setup(optimizer="sgd"),
    "accumulation": Setup(accumulation=3),
    "lora": Setup(method="lora"),
    "velora": Setup(velora=velora()),
    "redrawn": Setup(velora=velora(init="random", vectors="per_group", refresh_every=1)),
    "dense": Setup(velora=velora(gradient="dense")),
    "gc": Setup(checkpoint_every=1),
    "gc-2": Setup(checkpoint_every=2),
    "gc-velora": Setup(checkpoint_every=1, velora=velora()),
    "gc-lora-dropout": Setup(checkpoint_every=1, method="lora", lora_dropout=0.1),
    "recompute": Setup(recompute=True, chunked_loss=True),
}


def example(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model in training mode, and a batch with labels."""
    if name == "bert-classifier":
        model, batch = bert_classifier(), tiny_models.token_batch()
        batch["labels"] = torch.zeros(2, dtype=torch.long)
    else:
        build, make = tiny_models.MODELS[name]
        model, batch = build(), make(0)
        images = "pixel_values" in batch
        batch["labels"] = torch.ones(2).long() if images else batch["input_ids"].clone()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config.use_cache = False
            config.pad_token_id = None  # where there is one, GPT-2 looks for it in the batch
    batch = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}
    return model.to(dtype).train(), batch


def bert_classifier() -> Any:
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_models.bert().config)


def trace_of(
    name: str, setup: Setup, dtype: torch.dtype, fake: bool, device: str, **settings: Any
) -> Trace:
    model, batch = example(name, dtype)
    world = FakeWorld() if fake else None
    if world is not None:
        model, batch = world.model(model), world.batch(batch)
    model, optimizer = setup.apply(model, world, device)

    def run() -> Trace:
        return track(
            model,
            optimizer,
            lambda: model(**batch).loss,
            list(batch.values()),
            blocks=dict(repeated_blocks(model)),
            accumulation=setup.accumulation,
            vocab=tiny_models.VOCABULARY,
            **settings,
        )

    if world is None:
        return run()
    with world:
        return run()


def assert_alike(name: str, setup: Setup, dtype: torch.dtype, device: str = "cuda") -> None:
    real, fake = (trace_of(name, setup, dtype, kind, device) for kind in (False, True))
    for segment, peak in real.peaks.items():
        expected = (peak.total, peak.by_category())
        assert (fake.peaks[segment].total, fake.peaks[segment].by_category()) == expected, segment
    assert fake.peaks.keys() == real.peaks.keys()
    for number in ("weights", "saved", "gradients", "optimizer_state", "flops"):
        assert getattr(fake, number) == getattr(real, number), number
    assert min(real.weights, real.saved, real.gradients) > 0


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_fake_steps_hold_what_real_ones_hold(setup: Setup):
    if setup.method == "lora":
        pytest.importorskip("peft")
    assert_alike("llama", setup, torch.bfloat16)


@pytest.mark.parametrize("setup", ["full", "gc-velora"])
@pytest.mark.parametrize("name", ["llama-tied", "bert-classifier", "vit", "gpt2", "t5"])
def test_fake_steps_of_other_models(name: str, setup: str):
    assert_alike(name, SETUPS[setup], torch.float32, "cpu")


# ------------------------------------------------------------------ what a trace says


@pytest.mark.parametrize("name", ["llama", "bert-classifier", "vit", "gpt2"])
def test_saved_is_what_autograd_saves(name: str):
    """Besides it the loss itself is alive, and what the batch holds that nobody saves."""
    model, batch = example(name)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        storage = alias.untyped_storage()
        kept[storage.data_ptr()] = -(-storage.nbytes() // BLOCK) * BLOCK
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    own = [*model.parameters(), *model.buffers()]
    for tensor in own:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    for tensor in (loss, *batch.values()):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = -(-storage.nbytes() // BLOCK) * BLOCK
    trace = track(model, None, lambda: model(**batch).loss, list(batch.values()), steps=1)
    assert trace.saved == sum(kept.values())


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "velora"])
def test_a_trace_is_the_count_in_blocks(compressed: bool):
    """With tensors of whole blocks, as large as an independent count says."""

    def make() -> tuple[nn.Module, Callable[[], Tensor], torch.optim.Optimizer, Tensor]:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)), None
        if compressed:
            config = VeloraConfig(num_groups=32, init="random", track_delta=False)
            velora_torch.compress(model, config)
        x = torch.randn(64, 128)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, lambda: model(x).sum(), torch.optim.SGD(trained, 0.1, momentum=0.9), x

    model, loss, optimizer, _x = make()
    counted = measure_step(model, loss, optimizer)
    model, loss, optimizer, x = make()
    trace = track(model, optimizer, loss, [x], steps=2)
    assert trace.gradients == counted.gradients
    assert trace.optimizer_state == counted.optimizer_state
    assert BLOCK * 4 > trace.weights - counted.weights >= 0  # vectors are smaller than a block
    batch = 0 if not compressed else 4 * x.numel()  # which plain layers save anyway
    assert trace.saved == counted.saved_activations + BLOCK + batch


def test_states_exist_from_the_second_step_on():
    one, two = (
        trace_of("llama", Setup(), torch.float32, True, "cuda", steps=steps) for steps in (1, 2)
    )
    grown = two.peaks["backward"].by_category()["optimizer_state"]
    assert one.peaks["backward"].by_category()["optimizer_state"] == 0
    assert grown == one.optimizer_state == two.optimizer_state > 0
    assert one.flops == two.flops


def test_gradients_of_former_micro_batches_are_alive():
    one, three = (
        trace_of("llama", Setup(accumulation=n), torch.float32, True, "cuda") for n in (1, 3)
    )
    assert one.peaks["forward"].by_category()["gradients"] == 0
    assert three.peaks["forward"].by_category()["gradients"] == three.gradients == one.gradients
    assert three.flops.total == 3 * one.flops.total


def test_segments_of_a_model():
    trace = trace_of("llama", Setup(), torch.float32, True, "cuda")
    places = [f"model.layers/{place}" for place in ("first", "last", "after")]
    back = [f"model.layers/{place}" for place in ("last", "first", "before")]
    expected = ["forward", *(f"forward:{place}" for place in places)]
    expected += ["backward", *(f"backward:{place}" for place in back), "optimizer"]
    assert list(trace.segments()) == expected
    for name, total in trace.segments().items():
        assert total == max(p.total for n, p in trace.peaks.items() if _is(n, name))


def _is(segment: str, name: str) -> bool:
    return segment == name or (name == "optimizer" and segment.startswith(name))


def test_segments_of_an_optimizer_step():
    """Types are updated one after the other, and layers folded after that."""
    setup = Setup(velora=velora())
    trace = trace_of("llama", setup, torch.bfloat16, True, "cuda")
    steps = {name for name in trace.peaks if name.startswith("optimizer")}
    parts = ("torch.bfloat16", "torch.float32", "after the update")
    assert steps == {f"optimizer:{part}" for part in parts}


@pytest.mark.parametrize("setup", ["full", "gc", "velora"])
def test_categories_add_up(setup: str):
    for peak in trace_of("llama", SETUPS[setup], torch.float32, True, "cuda").peaks.values():
        assert sum(peak.by_category().values()) == peak.total
        assert min(peak.by_category().values()) >= 0


def test_tracked_steps_are_steps():
    """The same weights as after the same steps without a tracker, and no hook left."""
    results = []
    for tracked in (True, False):
        model, batch = example("llama")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if tracked:
            layers = dict(repeated_blocks(model))
            track(model, optimizer, lambda: model(**batch).loss, [], blocks=layers)  # noqa: B023
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
            assert all(p.grad is None for p in model.parameters())
        else:
            for _ in range(2):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_hooks_are_gone_after_an_error():
    model, _batch = example("llama")

    def fail() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        track(model, None, fail, [], blocks=dict(repeated_blocks(model)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not nn.modules.module._global_forward_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


# ------------------------------------------------------------------ attention masks


def saved_with(batch_change: Callable[[dict[str, Tensor]], None], fake: bool) -> int:
    model, batch = example("llama")
    batch_change(batch)
    batch = {name: tensor.repeat(1, 4) for name, tensor in batch.items()}
    if not fake:
        return track(model, None, lambda: model(**batch).loss, [], steps=1).saved
    world = FakeWorld()
    model, batch = world.model(model), world.batch(batch)
    with world:
        return track(model, None, lambda: model(**batch).loss, [], steps=1).saved


def full(batch: dict[str, Tensor]) -> None:
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])


def padded(batch: dict[str, Tensor]) -> None:
    full(batch)
    batch["attention_mask"][1, 4:] = 0


def packed(batch: dict[str, Tensor]) -> None:
    batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).repeat(2, 1)


@pytest.mark.parametrize("change", [full, padded, packed], ids=["full", "padded", "packed"])
def test_a_mask_is_made_where_a_real_batch_needs_one(change: Any):
    """transformers decides by looking at numbers, which fake batches don't have."""
    plain = saved_with(lambda batch: None, fake=True)
    assert saved_with(change, fake=True) == saved_with(change, fake=False)
    assert (saved_with(change, fake=True) == plain) == (change is full)


# ------------------------------------------------------------------ 4-bit weights


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' import may warn
def test_scales_of_4bit_weights_are_weights():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(256, 128, bias=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu")
    model = nn.Sequential(nn.Linear(64, 256), layer)
    trace = track(model, None, lambda: model(torch.randn(4, 64)).sum(), [], steps=1)
    plain = nn.Sequential(nn.Linear(64, 256))
    rest = track(plain, None, lambda: plain(torch.randn(4, 64)).sum(), [], steps=1).weights
    expected = layer_bytes((128, 256))
    assert expected <= trace.weights - rest < expected + 6 * BLOCK
