"""Small models with labels, their gradients, and what their forward keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny_models
from tests.tiny_models import VOCABULARY, WIDTH, token_batch

INNER = 40


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**_small(), tie_word_embeddings=True))


def gemma2() -> Any:
    """Norms with weight (1 + w), GELU gates, and a cap on the logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(**_small(), head_dim=8, final_logit_softcapping=30.0)
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def t5(gated: bool = False) -> Any:
    from transformers import T5ForConditionalGeneration

    config = tiny_models.t5().config
    config.feed_forward_proj = "gated-gelu" if gated else "relu"
    config.is_gated_act, config.dense_act_fn = gated, "gelu_new" if gated else "relu"
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config)


def _small() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }


def labelled() -> dict[str, Tensor]:
    batch = token_batch()
    return batch | {"labels": batch["input_ids"].clone()}


def labelled_pair() -> dict[str, Tensor]:
    ids = token_batch()["input_ids"]
    return {"input_ids": ids, "labels": ids.flip(1)}


def labelled_image() -> dict[str, Tensor]:
    return tiny_models.image_batch() | {"labels": torch.tensor([0, 2])}


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "llama": (tiny_models.llama, labelled),
    "llama-tied": (lambda: tiny_models.llama(tied=True), labelled),
    "qwen2": (qwen2, labelled),
    "gemma2": (gemma2, labelled),
    "gpt2": (tiny_models.gpt2, labelled),
    "bert": (tiny_models.bert, labelled),
    "vit": (tiny_models.vit, labelled_image),
    "t5-relu": (t5, labelled_pair),
    "t5-gated": (lambda: t5(gated=True), labelled_pair),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    make, batch = CASES[name]
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch().items()}
    return make().to(dtype).train(), cast


Gradients = dict[str, Tensor]


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Gradients]:
    """Loss and all gradients of one step; clears them."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def assert_same(
    ours: tuple[Tensor, Gradients], theirs: tuple[Tensor, Gradients], tolerance: float = 1e-12
) -> None:
    assert ours[0].dtype == theirs[0].dtype
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        error = (ours[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-30)
        # A bias of keys has no influence: its gradient is rounding.
        small = gradient.norm() < 1e-12
        assert small or error <= tolerance, f"{name}: {error}"


def kept(forward: Callable[[], Any], own: list[Tensor]) -> Counter[tuple[str, int]]:
    """(type, numbers) of each storage that autograd keeps, without those of ``own`` tensors."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        storages[alias.untyped_storage().data_ptr()] = alias
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    excluded = {t.untyped_storage().data_ptr() for t in own}
    counted = Counter(
        (str(t.dtype).removeprefix("torch."), t.untyped_storage().nbytes() // t.element_size())
        for address, t in storages.items()
        if address not in excluded
    )
    del result
    return counted


def kept_by(model: nn.Module, batch: dict[str, Tensor]) -> Counter[tuple[str, int]]:
    own = [*model.parameters(), *model.buffers(), *batch.values()]
    return kept(lambda: model(**batch).loss, own)
