"""What is timed: linear layers by themselves, whole models, and the parts of a layer's step.

Everything that a case computes is in its settings, so that a row can tell whether it is of today's
case. Shapes: T tokens of a step, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["layer", "model", "parts"]
Method = Literal["full", "lora"]

LOCAL, LARGE = "local", "large"
SCALES = {
    LOCAL: "two CPU cores and 16 GB of memory, an hour or two",
    LARGE: "the whole grid of widths and whole models: a GPU, or patience",
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Case:
    """A model or a layer, and the batch that each of its steps takes."""

    name: str
    level: Level
    method: Method
    about: str
    """In words, for a list and a table."""
    settings: Mapping[str, Any] = field(hash=False)
    """What :func:`velora_torch.bench.speed.workload.build` makes it from; JSON values."""
    scale: str = LOCAL

    @property
    def dtype(self) -> str:
        """Of the weights, the activations and the optimizer's states."""
        return str(self.settings["dtype"])


# ------------------------------------------------------------------ layers

_LOCAL_LAYERS = {  # (width, dtype) -> tokens
    (512, "bf16"): (512, 2048, 8192),
    (1024, "bf16"): (512, 2048, 8192),
    (2048, "bf16"): (512, 2048),
    (4096, "bf16"): (512, 2048),
    (8192, "bf16"): (512,),
    (512, "fp32"): (2048,),
    (1024, "fp32"): (2048,),
    (2048, "fp32"): (2048,),
    (4096, "fp32"): (512,),
}
_WIDTHS = (512, 1024, 2048, 4096, 8192)
_TOKENS = (512, 1024, 2048, 4096, 8192)
_PARTS = (
    (1024, "bf16", 2048),
    (2048, "bf16", 2048),
    (4096, "bf16", 512),
    (1024, "fp32", 2048),
    (1024, "fp16", 512),
)


def linear(width: int, dtype: str, tokens: int) -> dict[str, Any]:
    """Settings of a square linear layer without a bias, as most are in a LLaMA block."""
    return {
        "family": "linear",
        "features": width,
        "outputs": width,
        "tokens": tokens,
        "dtype": DTYPES[dtype],
    }


def _layer(width: int, dtype: str, tokens: int, level: Level, method: Method = "full") -> Case:
    kind = level if method == "full" else f"{level}-{method}"
    local = tokens in _LOCAL_LAYERS.get((width, dtype), ())
    return Case(
        f"{kind}-{width}-{dtype}-t{tokens}",
        level,
        method,
        f"{width} × {width}, {dtype}, T = {tokens}",
        linear(width, dtype, tokens),
        LOCAL if local else LARGE,
    )


LAYERS = [
    _layer(width, dtype, tokens, "layer")
    for dtype in ("bf16", "fp32")
    for width in _WIDTHS
    for tokens in _TOKENS
]
LORA_LAYERS = [_layer(width, "bf16", 2048, "layer", "lora") for width in (1024, 2048)]
PARTS = [_layer(width, dtype, tokens, "parts") for width, dtype, tokens in _PARTS]

# ------------------------------------------------------------------ models


def llama(width: int, intermediate: int, heads: int, blocks: int, batch: int) -> dict[str, Any]:
    """Settings of LLaMA blocks with a vocabulary so small that the head is no large part."""
    return {
        "family": "llama",
        "dtype": DTYPES["bf16"],
        "batch": batch,
        "length": 512,
        "config": {
            "vocab_size": 2048,
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_hidden_layers": blocks,
        },
    }


def preset(name: str, batch: int, length: int | None = None, **change: int) -> dict[str, Any]:
    """Settings of a known architecture; ``change`` replaces some of its sizes, dropout is off."""
    return {
        "family": "preset",
        "preset": name,
        "dtype": DTYPES["bf16"],
        "batch": batch,
        "length": length,
        "change": change,
    }


def _model(name: str, about: str, settings: dict[str, Any], scale: str = LOCAL) -> Case:
    return Case(name, "model", "full", about, settings, scale)


def _with_lora(case: Case) -> Case:
    about = f"{case.about}; LoRA r=16 on all linear layers"
    return Case(f"{case.name}-lora", "model", "lora", about, case.settings, case.scale)


def _in_float32(case: Case) -> Case:
    settings = {**case.settings, "dtype": DTYPES["fp32"]}
    return Case(f"{case.name}-fp32", "model", "full", f"{case.about}; in float32", settings, LARGE)


_LLAMA_1024 = _model(
    "llama-1024", "4 LLaMA blocks of width 1024, 4 × 512 tokens", llama(1024, 2816, 16, 4, 4)
)
_LLAMA_2048 = _model(
    "llama-2048", "2 LLaMA blocks of width 2048, 2 × 512 tokens", llama(2048, 5632, 16, 2, 2)
)
_VIT_B = _model(
    "vit-b",
    "3 blocks of ViT-B/16, 8 images of 197 tokens",
    preset("vit-b-16", 8, num_hidden_layers=3),
)
_ROBERTA = _model(
    "roberta-base",
    "3 blocks of RoBERTa-base with a small vocabulary, 8 × 128 tokens",
    preset("roberta-base", 8, 128, num_hidden_layers=3, vocab_size=4096),
)
_SMOLLM2 = _model(
    "smollm2-135m", "SmolLM2-135M, 1 × 512 tokens", preset("smollm2-135m-instruct", 1, 512)
)
_LLAMA_4096 = _model(
    "llama-4096",
    "2 LLaMA blocks of width 4096, 8 × 512 tokens",
    llama(4096, 11008, 32, 2, 8),
    LARGE,
)
MODELS = [
    _LLAMA_1024,
    _LLAMA_2048,
    _VIT_B,
    _ROBERTA,
    _SMOLLM2,
    _with_lora(_LLAMA_1024),
    _with_lora(_LLAMA_2048),
    *map(_in_float32, (_LLAMA_1024, _LLAMA_2048, _VIT_B, _ROBERTA, _SMOLLM2)),
    _model("vit-b-whole", "ViT-B/16, 64 images of 197 tokens", preset("vit-b-16", 64), LARGE),
    _model(
        "roberta-base-whole",
        "RoBERTa-base, 32 × 128 tokens",
        preset("roberta-base", 32, 128),
        LARGE,
    ),
    _model(
        "smollm2-135m-8",
        "SmolLM2-135M, 8 × 512 tokens",
        preset("smollm2-135m-instruct", 8, 512),
        LARGE,
    ),
    _LLAMA_4096,
    _with_lora(_LLAMA_4096),
]

CASES = [*MODELS, *LAYERS, *LORA_LAYERS, *PARTS]
"""All cases, those with the goals first."""


def cases_of(scale: str, known: Sequence[Case] = CASES) -> list[Case]:
    """The cases of a scale; the large one has the local ones in it."""
    return [case for case in known if scale == LARGE or case.scale == LOCAL]
