"""Simulations: extrapolated as whole, models untouched, and clear words for what cannot be."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velora_torch import VeloraConfig
from velora_torch.memory.simulator.architecture import resolve
from velora_torch.memory.simulator.setup import Setup
from velora_torch.memory.simulator.simulate import SimulationError, simulate
from velora_torch.subtoken import factored

from ... import tiny_models

pytest.importorskip("transformers")
# PEFT asks transformers under a name that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")

VELORA = VeloraConfig(sub_token_size=8)
DOWN = VeloraConfig(targets=["v_proj", "down_proj"], sub_token_size=8)


def mid_size(layers: int, **settings: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        **settings,
    )


# ------------------------------------------------------------------ extrapolation

# setup, blocks of the model, blocks that are simulated
EXTRAPOLATED: dict[str, tuple[Setup, int, tuple[int, int]]] = {
    "full": (Setup(), 7, (3, 4)),
    "lora": (Setup(method="lora"), 5, (3, 4)),
    "velora-accumulation": (Setup(velora=VELORA, accumulation=2), 5, (3, 4)),
    "gc-2": (Setup(checkpoint_every=2), 8, (4, 6)),
    "gc-3-velora": (Setup(checkpoint_every=3, velora=DOWN), 11, (5, 8)),
    "recompute-8bit": (
        Setup(recompute=True, chunked_loss=True, checkpoint_every=1, optimizer="adamw_8bit"),
        5,
        (3, 4),
    ),
    "qlora": (Setup(method="qlora", checkpoint_every=1), 5, (3, 4)),
}


@pytest.mark.parametrize(
    ("setup", "layers", "depths"), EXTRAPOLATED.values(), ids=list(EXTRAPOLATED)
)
def test_a_deep_model_follows_from_two_shallow_ones(
    setup: Setup, layers: int, depths: tuple[int, int]
):
    if setup.method != "full":
        pytest.importorskip("peft")
    settings: dict[str, Any] = {"batch": 2, "seq": 64, "setup": setup}
    if setup.method == "lora":
        settings["device"] = "cpu"
    short = simulate(mid_size(layers), **settings).to_dict()
    whole = simulate(mid_size(layers), extrapolate=False, **settings).to_dict()
    assert short.pop("simulated_depths") == depths
    assert whole.pop("simulated_depths") == ()
    assert short == whole
    assert len(whole["segments"]) >= 10


@pytest.mark.parametrize("layers", [3, 4])
def test_shallow_models_are_simulated_whole(layers: int):
    assert simulate(mid_size(layers), seq=8, update=False).simulated_depths == ()


def test_what_cannot_be_extrapolated_is_simulated_whole():
    numbered = VeloraConfig(targets=r".*layers\.[0-3]\..*", num_groups=8)
    for settings in ({"velora": numbered, "update": False}, {"steps": 1}):
        assert simulate(mid_size(6), seq=8, **settings).simulated_depths == ()


def test_models_whose_blocks_differ_are_simulated_whole():
    class Stack(nn.Module):
        def __init__(self, widths: list[int]) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(16, w), nn.GELU(), nn.Linear(w, 16)) for w in widths
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    x = torch.randn(4, 16)
    alike, differing = simulate(Stack([32] * 8), batch=x), simulate(Stack([32] * 7 + [64]), batch=x)
    assert alike.simulated_depths == (3, 4)
    assert differing.simulated_depths == ()
    assert differing.weights - alike.weights == 4 * 2 * 16 * 32
    t5 = simulate(tiny_models.t5(), batch=1, seq=8)
    assert t5.simulated_depths == ()


# ------------------------------------------------------------------ what a simulation says


def test_numbers_of_a_simulation():
    result = simulate(mid_size(4), batch=2, seq=64, dtype="float32", checkpoint_every=1)
    weights = sum(p.numel() for p in _built(mid_size(4)).parameters())
    assert result.gradients == 4 * weights
    assert 8 * weights <= result.optimizer_state < 8 * weights * 1.01  # and steps
    assert 4 * weights <= result.weights < 4 * weights * 1.01  # and buffers
    assert result.peak_bytes == sum(result.peak.values()) == max(result.segments.values())
    assert result.flops.recompute > 0
    assert str(result.coarseness) == "exact"
    assert (result.batch, result.seq) == (2, 64)
    assert "peak" in str(result)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["peak_gib"] == result.peak_bytes / 2**30
    assert values["setup"]["checkpoint_every"] == 1


def _built(config: Any) -> nn.Module:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_coarseness():
    velora = VeloraConfig(targets=["down_proj"], sub_token_size=16)
    result = simulate(mid_size(4), seq=8, velora=velora, update=False)
    weights = 4 * 688 * 256
    assert result.coarseness.weights == weights
    assert result.coarseness.trained == sum(p.numel() for p in _built(mid_size(4)).parameters())
    assert result.coarseness.kept == weights / 16
    assert result.coarseness.factor == 16


def test_without_update_there_are_no_states():
    with_states, without = (simulate(mid_size(3), seq=8, update=u) for u in (True, False))
    assert without.optimizer_state == 0 < with_states.optimizer_state
    assert "optimizer" not in without.segments
    assert (without.gradients, without.saved) == (with_states.gradients, with_states.saved)


def test_optimizers_of_a_gpu_take_all_parameters_at_once():
    cuda, cpu = (simulate(mid_size(3), seq=8, device=device) for device in ("cuda", "cpu"))
    assert cuda.segments["optimizer"] > cpu.segments["optimizer"]
    assert cuda.segments["backward"] == cpu.segments["backward"]


def test_float32_inputs_are_projected_as_on_the_device():
    """On a GPU in one product, which counts; on a CPU in pieces, of which only sums are made."""
    velora = replace(VELORA, init="random", vectors="per_group")
    cuda, cpu = (
        simulate(mid_size(3), seq=8, dtype="float32", device=device, velora=velora)
        for device in ("cuda", "cpu")
    )
    features = 3 * (6 * 256 + 688)
    assert cuda.flops.forward - cpu.flops.forward == 2 * 8 * features
    assert factored.CHUNK == {"cpu": 1 << 18}


def test_simulations_in_threads_take_turns():
    from transformers import masking_utils

    pieces, look = dict(factored.CHUNK), masking_utils.find_packed_sequence_indices
    model, devices = mid_size(3), ("cuda", "cpu", "cuda", "cpu")

    def peak(device: str) -> int:
        return simulate(model, seq=8, dtype="float32", device=device, velora=VELORA).peak

    expected = [peak(device) for device in devices]
    with ThreadPoolExecutor(len(devices)) as threads:
        assert list(threads.map(peak, devices)) == expected
    assert pieces == factored.CHUNK
    assert masking_utils.find_packed_sequence_indices is look


@pytest.mark.parametrize(
    ("settings", "marks"),
    [({}, 0), ({"method": "qlora"}, 1), ({"method": "qlora", "optimizer": "adamw_8bit"}, 2)],
    ids=["full", "qlora", "8-bit"],
)
def test_estimates_are_marked(settings: dict[str, Any], marks: int):
    if settings:
        pytest.importorskip("peft")
    result = simulate(mid_size(3), seq=8, update=False, **settings)
    assert len(result.estimated) == marks
    assert str(result).count("estimated: ") == marks


# ------------------------------------------------------------------ a built model


def test_a_built_model_is_not_changed():
    model = tiny_models.llama(layers=5)
    batch = {**tiny_models.token_batch(), "labels": tiny_models.token_batch()["input_ids"]}
    model(**batch).loss.backward()
    numbers = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: p.grad for n, p in model.named_parameters()}
    copies = {n: None if g is None else g.clone() for n, g in gradients.items()}
    before = torch.get_rng_state()
    settings = model.config.to_dict()
    setup = Setup(velora=VELORA, checkpoint_every=2, recompute=True, chunked_loss=True)

    result = simulate(model, batch=batch, setup=setup)

    assert torch.equal(torch.get_rng_state(), before)
    assert result.peak_bytes > 0
    assert not model.training
    assert model.config.to_dict() == settings
    assert {n for n, _ in model.named_parameters()} == set(numbers)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, numbers[name])
        assert parameter.grad is gradients[name]
        assert parameter.grad is None or torch.equal(parameter.grad, copies[name])
        assert parameter.requires_grad
        assert not parameter._post_accumulate_grad_hooks
    for module in model.modules():
        assert not {**module._forward_hooks, **module._forward_pre_hooks}
        assert type(module).__module__.split(".")[0] in ("transformers", "torch")
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("form", ["dict", "tuple", "tensor"])
def test_forms_of_a_batch(form: str):
    x = torch.randn(5, 16)
    batch = {"dict": {"x": x}, "tuple": (x,), "tensor": x}[form]
    result = simulate(tiny_models.net(), batch=batch)
    assert result.gradients > 0
    assert (result.batch, result.seq) == (None, None)


def test_own_loss():
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).softmax(-1).square().mean()

    x = torch.randn(64, 16)
    own = simulate(tiny_models.net(), batch=x, loss=loss)
    assert own.saved > simulate(tiny_models.net(), batch=x).saved


# ------------------------------------------------------------------ what cannot be simulated


@torch.library.custom_op("velora_tests::without_form", mutates_args=())
def without_form(x: Tensor) -> Tensor:
    return x.clone()


class Odd(nn.Module):
    """A model that does one odd thing."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(16, 4), kind

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.linear(x) * scale
        if self.kind == "item" and y.sum().item() > 0:
            return -y
        if self.kind == "nonzero":
            return y[y > 0]
        return without_form(y) if self.kind == "custom" else y


@pytest.mark.parametrize(
    ("kind", "operator"),
    [("item", "_local_scalar_dense"), ("nonzero", "nonzero"), ("custom", "without_form")],
)
def test_an_operator_without_a_form_is_named(kind: str, operator: str):
    x = torch.randn(5, 16)
    assert Odd(kind)(x).shape[-1] > 0  # on real tensors it runs
    with pytest.raises(SimulationError, match=operator) as caught:
        simulate(Odd(kind), batch=x)
    assert "Odd" in str(caught.value)
    assert "measure_step" in str(caught.value)


@pytest.mark.parametrize(
    "batch",
    [
        {"y": torch.randn(5, 16)},
        (torch.randn(5, 16), 1.0, 2.0),
        torch.randn(5, 15),
        {"scale": torch.ones(())},
    ],
    ids=["wrong-name", "too-many", "wrong-width", "missing"],
)
def test_a_batch_that_does_not_fit_the_forward(batch: Any):
    with pytest.raises(ValueError, match=r"forward takes \(x, scale\), the batch holds") as caught:
        simulate(Odd(), batch=batch)
    shape = (batch if isinstance(batch, Tensor) else next(iter(_tensors(batch)))).shape
    assert str(tuple(shape)) in str(caught.value)


def _tensors(batch: Any) -> list[Tensor]:
    return list(batch.values() if isinstance(batch, dict) else batch)


def test_a_transformers_batch_that_does_not_fit():
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(input_ids, attention_mask.*pixel_values"):
        simulate(tiny_models.llama(), batch={"pixel_values": ids})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "mps"}, "device must be 'cuda' or 'cpu', got 'mps'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": "many"}, "batch must be a number of examples, or a batch of tensors"),
        ({"batch": torch.ones(1, 2).long(), "seq": 4}, "seq=4 is for a number of examples"),
        ({"seq": 129}, "seq must be between 1 and 128"),
        ({"setup": Setup(), "method": "lora"}, r"give setup, or its fields \(method\), not both"),
        ({"method": "loar"}, "did you mean 'lora'"),
        ({"velora": VeloraConfig(targets=["q_prj"])}, "q_proj"),
        ({"loss": lambda model, batch: 1.0}, "must be a 0-d tensor"),
        ({"loss": lambda model, batch: model(**batch).logits}, "must be a 0-d tensor"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        simulate(mid_size(2), **({} if {"seq", "batch"} & set(settings) else {"seq": 8}) | settings)


def test_unknown_models(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="did you mean llama-7b"):
        simulate("llama-7B")
    with pytest.raises(ValueError, match="no folder or file"):
        simulate(str(tmp_path / "nothing"))


def test_nothing_to_train():
    model = tiny_models.net().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        simulate(model, batch=torch.randn(5, 16))


def test_a_model_that_nobody_can_make_a_batch_for():
    with pytest.raises(ValueError, match="what Net reads is unknown"):
        simulate(tiny_models.net(), batch=3)


def test_a_resolved_architecture_serves_many_simulations():
    architecture = resolve(mid_size(3))
    first, second = (simulate(architecture, seq=8, update=False) for _ in range(2))
    assert first == second
