"""Models of transformers and PEFT as their users have them, with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from velora_torch import VeloraConfig, compress, restore, summary
from velora_torch.model import compressed_layers

from .tiny_models import MODELS, gpt2, llama, loss_of, mixtral, run, t5, token_batch, train

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(  # PEFT reads a property that transformers renames
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

CONFIG = VeloraConfig(num_groups=4)
ADAMW = torch.optim.AdamW
LLAMA_LINEAR = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
}
COMPRESSED: dict[str, tuple[set[str], int]] = {
    "llama": (LLAMA_LINEAR, 14),
    "llama-tied": (LLAMA_LINEAR, 14),
    "gpt2": ({"c_attn", "c_proj", "c_fc"}, 8),
    "bert": ({"query", "key", "value", "dense"}, 13),
    "t5": ({"q", "k", "v", "o", "wi", "wo"}, 32),
    "vit": ({"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}, 12),
    "mixtral": ({"q_proj", "k_proj", "v_proj", "o_proj"}, 8),
}
"""Last components of the names of the compressed layers, and how many there are."""

EXACT: dict[str, dict[str, str]] = {
    "llama": {
        "model.embed_tokens": "Embedding is not a linear layer",
        "model.norm": "LlamaRMSNorm is not a linear layer",
        "lm_head": "output head of the model (name it in targets to compress it)",
    },
    "llama-tied": {
        "model.embed_tokens": "Embedding is not a linear layer",
        "lm_head": "tied: shares its weight with model.embed_tokens",
    },
    "gpt2": {
        "transformer.wte": "Embedding is not a linear layer",
        "transformer.ln_f": "LayerNorm is not a linear layer",
        "lm_head": "tied: shares its weight with transformer.wte",
    },
    "bert": {
        "bert.embeddings.word_embeddings": "Embedding is not a linear layer",
        "cls.predictions.decoder": "tied: shares its weight with bert.embeddings.word_embeddings",
    },
    "t5": {"encoder.final_layer_norm": "T5LayerNorm is not a linear layer"},
    "vit": {
        "vit.embeddings": "ViTEmbeddings is not a linear layer",
        "vit.embeddings.patch_embeddings.projection": "Conv2d is not a linear layer",
        "vit.layernorm": "LayerNorm is not a linear layer",
    },
    "mixtral": {
        "model.layers.0.mlp.experts": "fused weight of more than two dimensions",
        "lm_head": "output head of the model (name it in targets to compress it)",
    },
}


@pytest.fixture(params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_right_layers_are_compressed_and_the_rest_has_a_reason(family: str) -> None:
    model = MODELS[family][0]()
    compress(model, CONFIG)
    ends, count = COMPRESSED[family]
    found = summary(model)
    assert {name.rpartition(".")[2] for name in found.compressed} == ends
    assert len(found.compressed) == count
    assert found.exact.items() >= EXACT[family].items()
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and name not in found.compressed:
            assert found.exact[name] not in ("", "added after the model was compressed"), name
        if isinstance(module, (nn.Embedding, nn.Conv2d, nn.LayerNorm)):
            assert found.exact[name] == f"{type(module).__name__} is not a linear layer"


def test_forward_and_uncompressed_gradients_are_those_of_the_plain_model(family: str) -> None:
    build, batch = MODELS[family]
    plain, model = build(), compress(build(), CONFIG)
    assert torch.equal(run(plain, batch(0)), run(model, batch(0)))
    for either in (plain, model):
        either.train()
        loss_of(either, batch(0)).backward()
    exact = dict(plain.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if name.endswith(".coef"):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all()
        elif parameter.requires_grad:
            there, here = exact[name].grad, parameter.grad
            assert (there is None) == (here is None), name
            if there is not None:
                assert torch.equal(there, here), name
                compared += 1
    assert compared >= 5


def test_three_steps_move_every_weight_and_the_checkpoint_is_plain(
    family: str, tmp_path: Path
) -> None:
    build, batch = MODELS[family]
    model = build()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    compress(model, CONFIG)
    train(model, [batch(seed) for seed in range(3)], ADAMW, lr=1e-3)
    end = model.state_dict()
    assert list(end) == list(start)
    for name in compressed_layers(model):
        assert not torch.equal(start[f"{name}.weight"], end[f"{name}.weight"]), name
    logits = run(model, batch(7))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert not compressed_layers(again)
    assert torch.equal(run(again, batch(7)), logits)
    assert all(p.requires_grad for p in again.parameters())
    restore(model)
    assert torch.equal(run(model, batch(7)), logits)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations(attention: str) -> None:
    plain, model = llama(), llama()
    for either in (plain, model):
        either.set_attn_implementation(attention)
    compress(model, CONFIG)
    assert torch.equal(run(plain, token_batch()), run(model, token_batch()))


@pytest.mark.parametrize("build", [llama, gpt2, t5, mixtral], ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_generation_works_and_never_chooses_vectors(build: Any, training: bool) -> None:
    plain = build().train(training)
    model = compress(build().train(training), CONFIG)
    settings = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    ids = token_batch()
    there = plain.generate(**ids, **settings, attention_mask=torch.ones_like(ids["input_ids"]))
    here = model.generate(**ids, **settings, attention_mask=torch.ones_like(ids["input_ids"]))
    assert torch.equal(there, here)
    assert not any(layer.velora.drawn for layer in compressed_layers(model).values())
    train(model, [token_batch() if build is not t5 else MODELS["t5"][1](0)])
    vectors = [layer.velora_vectors.clone() for layer in compressed_layers(model).values()]
    model.train(training)
    model.generate(**ids, **settings, attention_mask=torch.ones_like(ids["input_ids"]))
    for before, layer in zip(vectors, compressed_layers(model).values(), strict=True):
        assert torch.equal(before, layer.velora_vectors)


def test_an_output_head_that_is_named_is_compressed() -> None:
    model = compress(llama(), VeloraConfig(targets=["lm_head"], num_groups=4))
    assert list(compressed_layers(model)) == ["lm_head"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_factors() -> None:
    grads = []
    for checkpointing in (False, True):
        model = compress(llama(), CONFIG).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of(model, token_batch()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------ PEFT


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return peft.get_peft_model(llama(), peft.LoraConfig(**(options | settings)))


def down_projections(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]


def test_all_linear_compresses_exactly_the_down_projections() -> None:
    model = adapted()
    expected = down_projections(model)
    compress(model, CONFIG)
    found = summary(model)
    assert list(found.compressed) == expected
    assert len(expected) == 14
    reasons = {found.exact[n.replace("lora_A", "lora_B")] for n in expected}
    assert reasons == {"up-projection of an adapter: its input is low-rank already"}
    bases = {found.exact[n.replace("lora_A.default", "base_layer")] for n in expected}
    assert bases == {"frozen: keeps no input"}


def test_a_name_compresses_that_down_projection_only() -> None:
    model = adapted()
    compress(model, VeloraConfig(targets=["v_proj"], num_groups=4))
    expected = [name for name in down_projections(model) if ".v_proj." in name]
    assert list(compressed_layers(model)) == expected
    assert len(expected) == 2


def test_up_projections_are_compressed_when_named() -> None:
    model = compress(adapted(r=8), VeloraConfig(targets=["lora_B"], num_groups=4))
    assert len(compressed_layers(model)) == 14
    assert all(".lora_B." in name for name in compressed_layers(model))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_dropout": 0.1},
        {"bias": "all"},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "down_proj"]},
    ],
    ids=["lora", "dora", "rslora", "dropout", "bias", "modules-to-save"],
)
def test_adapters_train_save_and_load(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, model = adapted(**settings).eval(), adapted(**settings).eval()
    compress(model, CONFIG)
    x = token_batch(5)
    assert torch.equal(run(plain, x), run(model, x))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, [token_batch(seed) for seed in range(3)], ADAMW, lr=1e-3)
    end = model.state_dict()
    assert list(end) == list(plain.state_dict())
    for name in compressed_layers(model):
        assert not torch.equal(start[f"{name}.weight"], end[f"{name}.weight"]), name
    for key in end:
        if "base_layer.weight" in key:
            assert torch.equal(start[key], end[key]), key
    logits = run(model, x)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(run(again, x), logits)
    restore(model)
    assert torch.equal(run(model, x), logits)
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(run(merged, x), logits, rtol=1e-4, atol=1e-4)


def test_merging_while_compressed_has_all_updates() -> None:
    model = compress(adapted(), VeloraConfig(num_groups=4, fold_every=3))
    train(model, [token_batch(seed) for seed in range(2)], ADAMW, lr=1e-3)
    logits = run(model, token_batch(5))
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(run(merged, token_batch(5)), logits, rtol=1e-4, atol=1e-4)


def test_modules_to_save_are_trained_in_their_copies() -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["down_proj", "lm_head"])
    original = copy.deepcopy(model.state_dict())
    compress(model, VeloraConfig(targets=["down_proj", "q_proj"], num_groups=4))
    names = list(compressed_layers(model))
    assert len(names) == 4
    assert sum("modules_to_save.default" in name for name in names) == 2
    train(model, [token_batch()] * 2, ADAMW, lr=1e-3)
    end = model.state_dict()
    for key, value in original.items():
        trained = "modules_to_save" in key or "lora_" in key
        assert torch.equal(value, end[key]) != trained, key


def test_an_adapter_that_is_switched_off_and_on() -> None:
    model = compress(adapted(), CONFIG).eval()
    x = token_batch()
    with model.disable_adapter():
        assert torch.equal(run(model, x), run(llama(), x))
    train(model, [x] * 2, ADAMW, lr=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model, x), run(llama(), x))
