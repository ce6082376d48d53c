"""Small models with random weights, and a few steps of training: no hub, no data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64
WIDTH = 32
TOKENS = 7


class Net(nn.Module):
    """Two linear layers with norms around them."""

    def __init__(self, width: int = 16, outputs: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.second = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(torch.relu(self.first(x))))


def net(width: int = 16, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(width).to(dtype)


def batches(count: int, width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, width, generator=generator).to(dtype) + 0.5 for _ in range(count)]


def train(
    model: nn.Module,
    inputs: Iterable[Any],
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    **settings: Any,
) -> torch.optim.Optimizer:
    """One optimizer step for each input, on the sum of squares of the output."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(trainable, **({"lr": 0.01} | settings))
    model.train()
    for x in inputs:
        step(model, optimizer, x)
    model.eval()
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Any) -> None:
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


def loss_of(model: nn.Module, x: Any) -> Tensor:
    y = run(model, x)
    return (y - 1).float().square().mean()


def run(model: nn.Module, x: Any) -> Tensor:
    """The output tensor: logits of a transformers model, or the last hidden state."""
    y = model(**x) if isinstance(x, dict) else model(x)
    if isinstance(y, Tensor):
        return y
    return y.logits if "logits" in y else y.last_hidden_state


def token_batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)}


def token_batches(count: int) -> list[dict[str, Tensor]]:
    return [token_batch(seed) for seed in range(count)]


# ------------------------------------------------------------------ transformers


def llama(tied: bool = False, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval()


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config).eval()


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config).eval()


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config).eval()


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MixtralForCausalLM(config).eval()


def image_batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}


def pair_batch(seed: int = 0) -> dict[str, Tensor]:
    ids = token_batch(seed)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Tensor]]]] = {
    "llama": (llama, token_batch),
    "llama-tied": (lambda: llama(tied=True), token_batch),
    "gpt2": (gpt2, token_batch),
    "bert": (bert, token_batch),
    "t5": (t5, pair_batch),
    "vit": (vit, image_batch),
    "mixtral": (mixtral, token_batch),
}
"""Name -> how to build a model, and a batch for a seed."""
