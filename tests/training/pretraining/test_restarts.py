"""ReLoRA: adapters that are merged into the weights and begin anew."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import velora_torch
from velora_torch.training.restarts import BASE_FILE, Restarts, base_weights, load_base, restart

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
FEATURES, HIDDEN, CLASSES, TOKENS = 12, 10, 3, 7
SCALE = 0.5  # alpha / r


class Small(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, HIDDEN)
        self.outer = nn.Linear(HIDDEN, CLASSES, bias=False)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def adapted(dtype=torch.float64, seed=0, **more):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["inner", "outer"], **more)
    return get_peft_model(Small(), config, autocast_adapter_dtype=False).to(dtype)


def batch(dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, FEATURES, generator=generator, dtype=torch.float64).to(dtype)


def trained(model, optimizer, steps, dtype=torch.float64):
    for number in range(steps):
        model(batch(dtype, number)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_training_in_two_parts_is_what_the_equations_say():
    """By hand: W + s B A, twice, with an optimizer of its own each time."""
    model = adapted()
    names = ("inner", "outer")
    weights = {
        n: w.detach().clone() for n, w in zip(names, base_weights(model).values(), strict=True)
    }
    bias = model.get_base_model().inner.base_layer.bias.detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for part in (1, 2):
        start = adapters(model)
        own = {n: p.requires_grad_() for n, p in start.items()}
        plain = torch.optim.AdamW(own.values(), lr=0.05)

        def effective(name, own=own, weights=weights):
            (A,) = (p for n, p in own.items() if f"{name}.lora_A" in n)
            (B,) = (p for n, p in own.items() if f"{name}.lora_B" in n)
            return weights[name] + SCALE * B @ A

        for number in range(3):
            x = batch(seed=number)
            hidden = torch.tanh(F.linear(x, effective("inner"), bias))
            F.linear(hidden, effective("outer")).square().sum().backward()
            plain.step()
            plain.zero_grad()
        trained(model, optimizer, 3)
        with torch.no_grad():
            weights = {name: effective(name) for name in names}
        if part == 1:
            restart(model, optimizer, seed=0, number=1)
            assert all((p == 0).all() for n, p in adapters(model).items() if "lora_B" in n)
    merged = model.merge_and_unload().state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(merged[f"{name}.weight"], weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_a_restart_leaves_the_output_and_takes_the_rest(compressed, rslora, dtype, tolerance):
    model = adapted(dtype, use_rslora=rslora)
    if compressed:
        velora_torch.compress(model, velora_torch.VeloraConfig(sub_token_size=2, init="random"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    trained(model, optimizer, 3, dtype)
    held = model.eval()(batch(dtype)).detach()
    former, base = adapters(model), {n: w.clone() for n, w in base_weights(model).items()}
    assert len(optimizer.state) == 4
    restart(model, optimizer, seed=0, number=1)
    torch.testing.assert_close(model(batch(dtype)), held, rtol=tolerance, atol=tolerance)
    assert not optimizer.state
    for name, weight in base_weights(model).items():
        assert weight.dtype is dtype
        assert not torch.equal(weight, base[name])
    for name, adapter in adapters(model).items():
        assert adapter.shape == former[name].shape
        if name.endswith("lora_B.default.weight"):
            assert not adapter.any()
        elif name.endswith("lora_A.default.weight"):
            bound = 1 / math.sqrt(adapter.shape[1])  # Kaiming's, as PEFT has it
            assert not torch.equal(adapter, former[name])
            assert 0.5 * bound < adapter.abs().max() <= bound * 1.01
    trained(model.train(), optimizer, 2, dtype)
    assert len(optimizer.state) == 4


def test_new_adapters_depend_on_seed_and_number_alone():
    def drawn(seed, number, global_seed):
        model = adapted()
        torch.manual_seed(global_seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        before = torch.get_rng_state()
        restart(model, optimizer, seed, number)
        assert torch.equal(before, torch.get_rng_state())
        (first, *_) = adapters(model).values()
        return first

    same = drawn(0, 1, 5)
    assert torch.equal(same, drawn(0, 1, 6))
    assert not torch.equal(same, drawn(1, 1, 5))
    assert not torch.equal(same, drawn(0, 2, 5))


def test_an_embeddings_adapter_and_a_transposed_weight_are_merged():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    shape = GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True)
    plain = GPT2LMHeadModel(shape).double().eval()
    model = get_peft_model(plain, config, autocast_adapter_dtype=False).double().eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.arange(8).view(1, 8)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = model(input_ids=ids).logits.detach()
    restart(model, optimizer, seed=0, number=1)
    torch.testing.assert_close(model(input_ids=ids).logits, held, rtol=1e-10, atol=1e-10)
    assert not optimizer.state


def test_the_rate_falls_at_each_restart_and_comes_back():
    restarts = Restarts(every=10, warmup=3, seed=0)
    shares = [restarts.share(step) for step in range(25)]
    assert shares == [1.0] * 10 + [0.25, 0.5, 0.75] + [1.0] * 7 + [0.25, 0.5, 0.75, 1.0, 1.0]
    assert restarts.scheduled(lambda step: step / 100)(11) == pytest.approx(0.055)
    assert Restarts(every=10, warmup=0, seed=0).share(10) == 1.0


def test_weights_of_another_run_are_refused(tmp_path):
    save_file({"inner.weight": torch.zeros(2, 2)}, tmp_path / BASE_FILE)
    with pytest.raises(ValueError, match=r"inner\.weight.*which this model has not"):
        load_base(base_weights(adapted()), tmp_path)
