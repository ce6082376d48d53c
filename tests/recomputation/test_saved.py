"""What a training forward keeps, number by number."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_torch
from tests import tiny_models
from tests.tiny_models import VOCABULARY, WIDTH
from velora_torch import VeloraConfig
from velora_torch.memory.fake import FakeWorld
from velora_torch.recomputation import recompute

from .cases import INNER, kept, kept_by, labelled

pytestmark = pytest.mark.filterwarnings("ignore:VeLoRA. compressing these layers frees no")

T, D, I, G = 14, WIDTH, INNER, 4  # noqa: E741
LSE, KV = T * 4, T * 16


def llama(layers: int, dtype: torch.dtype) -> Any:
    model = tiny_models.llama(layers=layers).to(dtype).train()
    model.config.use_cache = False
    return model


def one_block(dtype: torch.dtype, prepare: Any) -> Counter[tuple[str, int]]:
    """What a block of LLaMA keeps: two blocks less one."""
    found = []
    for layers in (1, 2):
        model = llama(layers, dtype)
        prepare(model)
        found.append(kept_by(model, labelled()))
    return found[1] - found[0]


def compress(model: Any) -> None:
    velora_torch.compress(model, VeloraConfig(num_groups=G, init="random"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_llama_block(dtype: torch.dtype):
    name = str(dtype).removeprefix("torch.")
    found = one_block(dtype, recompute)
    # The inputs and outputs of two norms, q, and the output of attention; k and v; g and u.
    expected = Counter({(name, T * D): 6, (name, KV): 2, (name, T * I): 2})
    expected["float32", LSE] += 1
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("first", ["recompute", "compress"])
def test_compressed_llama_block(first: str, dtype: torch.dtype):
    def prepare(model: Any) -> None:
        steps = [recompute, compress]
        for step in steps if first == "recompute" else reversed(steps):
            step(model)

    name = str(dtype).removeprefix("torch.")
    found = one_block(dtype, prepare)
    # The inputs of two norms, q, and the output of attention; k and v; g and u; seven z.
    expected = Counter({(name, T * D): 4, (name, KV): 2, (name, T * I): 2})
    expected[name, T * G] += 7
    expected["float32", LSE] += 1
    assert found == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_llama_block():
    peft = pytest.importorskip("peft")

    def prepare(model: Any) -> None:
        lora = peft.LoraConfig(r=2, target_modules="all-linear")
        peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
        recompute(model)

    found = one_block(torch.bfloat16, prepare)
    # The frozen layers keep nothing; lora_A what they would, lora_B its input of rank 2.
    expected = Counter({("bfloat16", T * D): 6, ("bfloat16", KV): 2, ("bfloat16", T * I): 2})
    expected["bfloat16", T * 2] += 7
    expected["float32", LSE] += 1
    assert found == expected


def test_gradient_checkpointing_keeps_block_inputs():
    def prepare(model: Any) -> None:
        recompute(model).activation_checkpointing_enable()

    assert one_block(torch.float32, prepare) == Counter({("float32", T * D): 1})


def test_the_logits_are_not_kept():
    model = llama(1, torch.bfloat16)
    before = kept_by(model, labelled())
    assert before["float32", T * VOCABULARY] == 1
    after = kept_by(recompute(model, norms=False, activations=False), labelled())
    assert before - after == Counter({("float32", T * VOCABULARY): 1, ("float32", 1): 1})


def test_fake_tensors():
    model = llama(2, torch.bfloat16)
    plain, world = kept_by(model, labelled()), FakeWorld()
    plain_twin = world.model(model)
    saving = plain - kept_by(recompute(model), labelled())
    twin, batch = world.model(model), world.batch(labelled())
    with world:
        # Less: transformers masks and repeats keys when it runs on fake tensors.
        assert fake_kept(plain_twin, batch) - fake_kept(twin, batch) == saving
        twin(**batch).loss.backward()
    assert all(p.grad is not None for p in twin.parameters())


def fake_kept(model: nn.Module, batch: dict[str, Tensor]) -> Counter[tuple[str, int]]:
    """As ``kept_by``, but fake storages have no addresses."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        storages[alias.untyped_storage()._cdata] = alias
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    for tensor in [*model.parameters(), *model.buffers(), *batch.values(), loss]:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return Counter(
        (str(t.dtype).removeprefix("torch."), t.untyped_storage().nbytes() // t.element_size())
        for t in storages.values()
    )


# ------------------------------------------------------------------ small parts


class Gate(nn.Module):
    """act(gate) * up, then down, as in LLaMA."""

    def __init__(self, flipped: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, I), nn.Linear(D, I)
        self.down, self.act, self.flipped = nn.Linear(I, D), nn.SiLU(), flipped

    def forward(self, x: Tensor) -> Tensor:
        activated, u = self.act(self.gate(x)), self.up(x)
        return self.down(u * activated if self.flipped else activated * u)


def numbers(model: nn.Module, x: Tensor) -> list[int]:
    counted = kept(lambda: model(x), [*model.parameters(), *model.buffers(), x])
    return sorted(n for (_, n) in counted.elements())


@pytest.mark.parametrize("flipped", [False, True], ids=["act-first", "act-second"])
def test_gate(flipped: bool):
    model, x = Gate(flipped), torch.randn(2, T // 2, D, requires_grad=True)
    assert numbers(model, x) == [T * I] * 4
    assert numbers(recompute(model), x) == [T * I] * 2  # g and u
    compress(model)
    assert numbers(model, x) == [T * G] * 3 + [T * I] * 2


def test_plain_mlp():
    model = nn.Sequential(nn.Linear(D, I), nn.GELU(), nn.Linear(I, D))
    x = torch.randn(T, D, requires_grad=True)
    assert numbers(model, x) == [T * I] * 2
    assert numbers(recompute(model), x) == [T * I]  # the activation's input
    compress(model)
    assert numbers(model, x) == [T * G] * 2 + [T * I]


def test_the_mlp_of_gpt2():
    model: Any = tiny_models.gpt2().train().transformer.h[0].mlp
    x = torch.randn(2, 7, D, requires_grad=True)
    recompute(model)
    assert numbers(model, x) == [T * 4 * D]


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() * x.float().pow(2).mean(-1, True).rsqrt()).to(x.dtype)


def test_norm():
    model, x = Norm(), torch.randn(T, D, requires_grad=True)
    assert len(numbers(model, x)) >= 2
    recompute(model)
    y = torch.randn(T, D, requires_grad=True)
    counted = kept(lambda: model(y), [model.weight])
    assert counted == Counter({("float32", T * D): 1})


def test_a_deferred_value_that_is_used_keeps_no_more():
    model = nn.Sequential(nn.Linear(D, I), nn.GELU(approximate="tanh"))
    x = torch.randn(T, D, requires_grad=True)

    def forward() -> Tensor:
        h = model(x)
        return F.softmax(h, -1) + h.tanh()

    own = [*model.parameters(), x]
    before = kept(forward, own)
    recompute(model)
    assert kept(forward, own) == before
