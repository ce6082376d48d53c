"""Pre-training from random weights: the protocol of the paper's section 4.4, and its neighbours.

The paper trains LLaMA-60M and 130M on C4 against full-rank training, GaLore, LoRA and FLoRA
("paper"). Here ("local") it is LLaMAs of about 3 and 15 million parameters on Debian's and Python's
English documentation; "long" has four times the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from velora_torch.bench.grid import Bench, Finished, Scale, Variant, with_seed
from velora_torch.bench.pretrain.measure import details

BLOCKS = r".*\.layers\.\d+\."
ALL_LINEAR = BLOCKS + r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VALUE_AND_DOWN = BLOCKS + r"(self_attn\.v_proj|mlp\.down_proj)"  # the paper, section 4.4
QUERY_AND_KEY = BLOCKS + r"self_attn\.[qk]_proj"
NOT_QUERY_AND_KEY = BLOCKS + r"(self_attn\.[vo]_proj|mlp\.(gate|up|down)_proj)"
DOWN_PROJECTIONS = ["lora_A"]  # of PEFT's LoRA
REDRAWN: dict[str, Any] = {"init": "rademacher", "vectors": "per_group", "refresh_every": 200}
FIXED: dict[str, Any] = {**REDRAWN, "refresh_every": None}
M = 8
PUBLISHED_M = {"v_proj": 8, "down_proj": 16}  # of LLaMA-60M: 64 and 86 groups

VARIANTS = (
    Variant("full", "Full"),
    Variant("full-gc", "Full + gradient checkpointing", "full"),
    Variant("full-8bit", "Full, 8-bit AdamW", "full"),
    Variant("lora", "LoRA", "full"),
    Variant("relora", "ReLoRA", "full"),
    Variant("galore", "GaLore", "full"),
    Variant("galore-twelfth", "GaLore, rank 1/12", "full"),
    Variant("apollo", "APOLLO", "full"),
    Variant("flora", "FLoRA", "full"),
    Variant("velora-paper", "VeLoRA as published: v, down", "full"),
    Variant("velora-value-down", "VeLoRA: v, down", "full"),
    Variant("velora-not-qk", "VeLoRA: all but q, k", "full"),
    Variant("velora-all", "VeLoRA: all", "full"),
    Variant("velora-value-down-faster", "VeLoRA: v, down, at twice the rate", "full"),
    Variant("velora-not-qk-faster", "VeLoRA: all but q, k, at twice the rate", "full"),
    Variant("lora-velora", "LoRA + VeLoRA", "full"),
    Variant("lora-velora-8bit", "LoRA + VeLoRA, 8-bit AdamW", "full"),
    Variant("velora-value-down-apollo", "VeLoRA: v, down, APOLLO on the rest", "full"),
    Variant("galore-packaged", "GaLore, eps of its package", "full"),
    Variant("galore-twelfth-packaged", "GaLore, rank 1/12, eps of its package", "full"),
    Variant("apollo-eps", "APOLLO, eps of full training", "full"),
    Variant("velora-value-down-signs", "VeLoRA: v, down, random signs", "full"),
    Variant("velora-value-down-redrawn", "VeLoRA: v, down, signs, redrawn", "full"),
    Variant("velora-value-down-rarely", "VeLoRA: v, down, redrawn every 600 steps", "full"),
    Variant("velora-not-qk-average", "VeLoRA: all but q, k, fixed average", "full"),
    Variant("velora-qk", "VeLoRA: q, k alone", "full"),
    Variant("velora-qk-faster", "VeLoRA: q, k alone, at twice the rate", "full"),
    Variant("velora-all-often", "VeLoRA: all, redrawn every 50 steps", "full"),
    Variant("velora-all-rarely", "VeLoRA: all, redrawn every 600 steps", "full"),
    Variant("velora-all-fixed", "VeLoRA: all, never redrawn", "full"),
    Variant("velora-all-gaussian", "VeLoRA: all, Gaussian v", "full"),
    Variant("velora-all-average", "VeLoRA: all, fixed average", "full"),
    Variant("velora-all-running", "VeLoRA: all, running average", "full"),
    Variant("velora-all-each-step", "VeLoRA: all, whole gradient, redrawn every step", "full"),
    Variant("velora-all-m4", "VeLoRA: all, M = 4", "full"),
    Variant("velora-all-m16", "VeLoRA: all, M = 16", "full"),
    Variant("velora-all-m32", "VeLoRA: all, M = 32", "full"),
    Variant("lora-8bit", "LoRA, 8-bit AdamW", "full"),
    Variant("velora-value-down-8bit", "VeLoRA: v, down, 8-bit AdamW", "full"),
    Variant(
        "velora-value-down-redrawn-8bit", "VeLoRA: v, down, signs, redrawn, 8-bit AdamW", "full"
    ),
    Variant("velora-all-8bit", "VeLoRA: all, 8-bit AdamW", "full"),
    Variant("velora-all-m4-8bit", "VeLoRA: all, M = 4, 8-bit AdamW", "full"),
    Variant("full-8bit-gc-chunked", "Full, 8-bit AdamW, GC, chunked loss", "full"),
    Variant("lora-8bit-gc-chunked", "LoRA, 8-bit AdamW, GC, chunked loss", "full"),
    Variant(
        "velora-value-down-8bit-gc-chunked",
        "VeLoRA: v, down, 8-bit AdamW, GC, chunked loss",
        "full",
    ),
    Variant(
        "velora-all-m4-8bit-gc-chunked",
        "VeLoRA: all, M = 4, 8-bit AdamW, GC, chunked loss",
        "full",
    ),
)


def _velora(
    targets: str | list[str], size: int | dict[str, int] = M, **more: Any
) -> dict[str, Any]:
    return {"targets": targets, "sub_token_size": size, "track_delta": False, **more}


METHODS: dict[str, dict[str, Any]] = {
    "full": {"velora": None},
    "lora": {"velora": None},
    "lora-velora": {"velora": _velora(DOWN_PROJECTIONS, **REDRAWN)},
    "relora": {"velora": None},
    "galore": {"velora": None},
    "galore-twelfth": {"velora": None},
    "apollo": {"velora": None},
    "flora": {"velora": None},
    "velora-paper": {"velora": _velora(VALUE_AND_DOWN, PUBLISHED_M, gradient="dense")},
    "velora-value-down": {"velora": _velora(VALUE_AND_DOWN)},
    "velora-not-qk": {"velora": _velora(NOT_QUERY_AND_KEY, **REDRAWN)},
    "velora-all": {"velora": _velora(ALL_LINEAR, **REDRAWN)},
    "velora-value-down-faster": {"velora": _velora(VALUE_AND_DOWN)},
    "velora-not-qk-faster": {"velora": _velora(NOT_QUERY_AND_KEY, **REDRAWN)},
    "velora-value-down-apollo": {"velora": _velora(VALUE_AND_DOWN)},
    "velora-value-down-signs": {"velora": _velora(VALUE_AND_DOWN, **FIXED)},
    "velora-value-down-redrawn": {"velora": _velora(VALUE_AND_DOWN, **REDRAWN)},
    "velora-value-down-rarely": {
        "velora": _velora(VALUE_AND_DOWN, **{**REDRAWN, "refresh_every": 600})
    },
    "velora-not-qk-average": {"velora": _velora(NOT_QUERY_AND_KEY)},
    "velora-qk": {"velora": _velora(QUERY_AND_KEY, **REDRAWN)},
    "velora-qk-faster": {"velora": _velora(QUERY_AND_KEY, **REDRAWN)},
    "velora-all-often": {"velora": _velora(ALL_LINEAR, **{**REDRAWN, "refresh_every": 50})},
    "velora-all-rarely": {"velora": _velora(ALL_LINEAR, **{**REDRAWN, "refresh_every": 600})},
    "velora-all-fixed": {"velora": _velora(ALL_LINEAR, **FIXED)},
    "velora-all-gaussian": {"velora": _velora(ALL_LINEAR, **{**REDRAWN, "init": "random"})},
    "velora-all-average": {"velora": _velora(ALL_LINEAR)},
    "velora-all-running": {
        "velora": _velora(ALL_LINEAR, init="running_average", vectors="per_group")
    },
    "velora-all-each-step": {
        "velora": _velora(ALL_LINEAR, gradient="dense", **{**REDRAWN, "refresh_every": 1})
    },
    "velora-all-m4": {"velora": _velora(ALL_LINEAR, 4, **REDRAWN)},
    "velora-all-m16": {"velora": _velora(ALL_LINEAR, 16, **REDRAWN)},
    "velora-all-m32": {"velora": _velora(ALL_LINEAR, 32, **REDRAWN)},
}
"""What is compressed, by variant; one with `ADDITIONS` compresses what it does without them."""
ADDITIONS: dict[str, dict[str, Any]] = {
    "8bit": {"optimizer": "adamw_bnb_8bit"},
    "gc": {"gradient_checkpointing": True},
    "chunked": {"chunked_loss": True},
    "packaged": {"eps": 1e-6},  # that of galore_torch
    "eps": {"eps": 1e-8},  # that of all but APOLLO
}
"""Settings of `train`, by the word at the end of a variant's name."""


def without_additions(variant: str) -> str:
    """The variant that it adds to: "velora-all-m4" of "velora-all-m4-8bit"."""
    return "-".join(word for word in variant.split("-") if word not in ADDITIONS)


FASTER = {
    "velora-qk-faster": QUERY_AND_KEY,
    "velora-value-down-faster": VALUE_AND_DOWN,
    "velora-not-qk-faster": NOT_QUERY_AND_KEY,
}
"""Layers with twice the learning rate of the other linear layers, by variant."""
PROJECTING = {
    "galore": "galore_adamw",
    "galore-twelfth": "galore_adamw",
    "apollo": "apollo_adamw",
    "flora": "flora",
    "velora-value-down-apollo": "apollo_adamw",
}
"""Optimizers that keep the state of what is not compressed in a subspace, by variant."""
APOLLO_EPS: dict[str, Any] = {"eps": 1e-6, "optimizer_settings": {"eps": 1e-8}}
"""Adam's eps in apollo_torch, and in transformers for the weights that APOLLO projects; everything
else has 1e-8. "apollo-eps", which has it everywhere, ends where "apollo" does."""
RANK_SHARES = {"galore-twelfth": 12}
"""The width over the rank; 4 is GaLore's for its smallest model: 128 of 512. With a twelfth its
whole state, which has projections besides, is as large as that of VeLoRA with M = 8."""
WIDTHS = {"llama-3m": 256, "llama-15m": 384, "llama-60m": 512, "llama-130m": 768}
PROJECTION_GAP = 200  # GaLore's for C4; APOLLO, FLoRA and, here, ReLoRA take the same


@dataclass(frozen=True)
class Rates:
    """Learning rates of a run."""

    rest: float
    """Of embeddings, norms and the output head."""
    linear: float | None = None
    """Of the blocks' linear layers, in whatever form they are trained: weights, coefficients,
    adapters, projected gradients. None: as the rest."""
    coefficients: float | None = None
    """Of coefficients alone. None: as the other linear layers."""


REST = 3.2e-2  # all methods have it: full training loses 7% at half of it, gains 1% at double
# Chosen by benchmarks/choose_rates.py on other held-out text, with seed 100 and half of the tokens:
# docs/results/pretraining.md. Variants that it does not try have the rate of what they vary;
# on the larger model velora-all-running has that of an older sweep.
_SMALL = dict.fromkeys(METHODS, 1e-3) | {
    "lora": 2e-3,
    "lora-velora": 2e-3,
    "relora": 2e-3,
    "galore": 2e-3,
    "galore-twelfth": 4e-3,
    "apollo": 4e-3,
    "velora-value-down-apollo": 4e-3,
    "flora": 5e-4,
    **{name: 2e-3 for name in METHODS if name.startswith("velora-all")},
    "velora-all-running": 2.5e-4,
    "velora-all-each-step": 1e-3,
}
_LARGER = dict.fromkeys(METHODS, 1e-3) | {
    "full": 5e-4,
    "velora-paper": 5e-4,
    **{name: 5e-4 for name in METHODS if name.startswith("velora-value-down")},
    "velora-value-down-apollo": 1e-3,
    "galore-twelfth": 2e-3,
    "flora": 2.5e-4,
    "velora-all-running": 2.5e-4,
}
_BESIDE = {"velora-value-down-apollo": "velora-value-down"}
"""Variants with two kinds of linear layers: coefficients have the rate of the variant named."""
LOCAL_RATES = {
    task: {
        v.name: Rates(REST, rates[without_additions(v.name)], rates.get(_BESIDE.get(v.name, "")))
        for v in VARIANTS
    }
    for task, rates in (("llama-3m", _SMALL), ("llama-15m", _LARGER))
}


def method(
    variant: str,
    model: str,
    seed: int,
    rates: Rates,
    scale: float = 1.0,
    own_rank: int | None = None,
    restart_every: int = PROJECTION_GAP,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a variant: those of the recipe's top level, and those of `train`.

    `scale` is that of GaLore and APOLLO; it multiplies the rate of the linear layers. `own_rank` is
    that of variants without one of `RANK_SHARES`; None: a quarter of the width. `restart_every` is
    ReLoRA's.
    """
    base = without_additions(variant)
    rank = WIDTHS[model] // RANK_SHARES.get(base, 4)
    if own_rank is not None and base not in RANK_SHARES:
        rank = own_rank
    top: dict[str, Any] = {"method": "full", **with_seed(METHODS[base], seed)}
    train: dict[str, Any] = {"optimizer": "adamw_torch_fused", "learning_rate": rates.rest}
    if rates.linear is not None:
        train["learning_rates"] = {ALL_LINEAR: rates.linear}
    if rates.coefficients is not None:
        train["coefficient_learning_rate"] = rates.coefficients
    if variant in FASTER:  # of two patterns that match, the later counts
        twice = 2 * (rates.linear or rates.rest)
        train.setdefault("learning_rates", {})[FASTER[variant]] = twice
    if base in ("lora", "lora-velora", "relora"):
        top |= {
            "method": "lora",
            "lora": {
                "r": rank,
                "alpha": float(rank),
                "dropout": 0.0,
                "targets": ALL_LINEAR,
                "restart_every": restart_every if base == "relora" else None,
            },
        }
    elif (optimizer := PROJECTING.get(base)) is not None:
        own = APOLLO_EPS if optimizer == "apollo_adamw" else {}
        settings = {
            "rank": rank,
            "update_proj_gap": PROJECTION_GAP,
            **({"seed": seed} if optimizer == "flora" else {"scale": scale}),
            **own.get("optimizer_settings", {}),
        }
        train |= {
            **own,
            "optimizer": optimizer,
            "optimizer_targets": ALL_LINEAR,
            "optimizer_settings": settings,
        }
    for word in variant.split("-"):
        train |= ADDITIONS.get(word, {})
    return top, train


LOCAL_STEPS = {"llama-3m": 600, "llama-15m": 600}
LOCAL_BATCH, LOCAL_LENGTH = 16, 128


def local_recipe(task: str, variant: str, seed: int, rates: Rates | None = None) -> dict[str, Any]:
    """A cell for two CPU cores; with other learning rates than the chosen ones, if given."""
    top, train = method(variant, task, seed, rates or LOCAL_RATES[task][variant])
    return {
        **top,
        "task": "pretrain",
        "model": task,
        "dtype": "float32",
        "tokenizer": {"vocab_size": 4096},
        "data": {
            "train": "debian-docs",
            "max_length": LOCAL_LENGTH,
            "eval_fraction": 0.02,
        },
        "train": {
            **train,
            **_optimisation(seed),
            "tokens": LOCAL_STEPS[task] * LOCAL_BATCH * LOCAL_LENGTH,
            "batch_size": LOCAL_BATCH,
            "eval_every": LOCAL_STEPS[task] // 6,
            "autocast": True,
        },
        "evaluate": {"before": False, "batch_size": 32, "max_examples": 512},
    }


LONGER = 4  # times the tokens of the local scale


def long_recipe(task: str, variant: str, seed: int, rates: Rates | None = None) -> dict[str, Any]:
    """A cell of the local scale with more tokens: whether the order of methods stays."""
    recipe = local_recipe(task, variant, seed, rates)
    train = recipe["train"]
    longer = {name: LONGER * train[name] for name in ("tokens", "eval_every")}
    return {**recipe, "train": {**train, **longer}}


PAPER_TOKENS = {"llama-60m": "1.1B", "llama-130m": "2.2B"}  # GaLore's budgets, which T4 takes
PAPER_BATCH, PAPER_ACCUMULATION, PAPER_LENGTH = 128, 4, 256  # 512 sequences a step
PAPER_RANKS = {"llama-60m": 128, "llama-130m": 256}
"""GaLore's, of the variants that have no share of the width of their own."""
PAPER_RESTARTS = {"llama-60m": 2000, "llama-130m": 4000}
"""A quarter of the steps, as in ReLoRA's own trainings."""
PAPER_RATES = {
    name: 1e-2
    for name in METHODS
    if name.startswith(("galore", "apollo")) or name in ("velora-paper", "velora-value-down-apollo")
}
"""Their own; others have 1e-3."""


def paper_recipe(task: str, variant: str, seed: int) -> dict[str, Any]:
    """A cell with the paper's model and data; needs the hub and a GPU."""
    rates = Rates(PAPER_RATES.get(without_additions(variant), 1e-3))
    scale = 0.25 if variant.startswith("galore") else 1.0
    top, train = method(variant, task, seed, rates, scale, PAPER_RANKS[task], PAPER_RESTARTS[task])
    return {
        **top,
        "task": "pretrain",
        "model": task,
        "dtype": "bfloat16",
        "tokenizer": {"source": "google-t5/t5-base"},  # GaLore's: 32,000 tokens
        "data": {
            "train": "allenai/c4",
            "subset": "en",
            "eval_split": "validation",
            "max_length": PAPER_LENGTH,
        },
        "train": {
            **train,
            **_optimisation(seed),
            "tokens": PAPER_TOKENS[task],
            "batch_size": PAPER_BATCH,
            "accumulation": PAPER_ACCUMULATION,
            "eval_every": 1000,
        },
        "evaluate": {"before": False, "batch_size": 64},
    }


def _optimisation(seed: int) -> dict[str, Any]:
    return {
        "schedule": "cosine",
        "warmup": 0.1,
        "max_grad_norm": 1.0,
        "seed": seed,
        "save_final": False,
        "tensorboard": False,
    }


def _report(finished: Finished, output: Path) -> str:
    from velora_torch.bench.pretrain.table import report

    return report(finished, output)


PRETRAIN = Bench(
    name="pretrain",
    title="Pre-training: language models from random weights",
    variants=VARIANTS,
    scales={
        "local": Scale(tuple(LOCAL_STEPS), local_recipe, timed="llama-15m", details=details),
        "long": Scale(tuple(LOCAL_STEPS), long_recipe, timed="llama-3m", details=details),
        "paper": Scale(tuple(PAPER_TOKENS), paper_recipe, timed="llama-60m", details=details),
    },
    notes="Perplexity on held-out text: lower is better.",
    report=_report,
)
