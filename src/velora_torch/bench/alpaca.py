"""Language models: the protocol of Alpaca and MMLU, the paper's table T3.

The paper fine-tunes LLaMA-7B and 13B on Alpaca and scores them on MMLU, five-shot ("paper"). Here
("local") it is SmolLM2-135M on the questions of TREC-50 as instructions, scored on which of the
fifty answers is likeliest, with the perplexity on general text before and after.
"""

from __future__ import annotations

from typing import Any

from velora_torch.bench import lm_evaluation
from velora_torch.bench.grid import Bench, Scale, Variant, with_seed

VARIANTS = (
    Variant("lora-bf16", "LoRA, bf16"),
    Variant("lora-nf4", "LoRA, nf4"),
    Variant("qlora", "QLoRA"),
    Variant("qlora+velora", "QLoRA + VeLoRA", "qlora"),
    Variant("qlora+velora-random", "QLoRA + VeLoRA, random v, M = 4", "qlora"),
    Variant("coefficients-nf4", "Coefficients alone, nf4", "lora-nf4"),
    Variant("full", "Full"),
    Variant("full+velora", "Full + VeLoRA", "full"),
)
VALUE_AND_DOWN = ["v_proj", "down_proj"]  # T3: on LoRA these names cover their lora_A
VELORA = {"targets": VALUE_AND_DOWN, "num_groups": 32, "init": "average", "scale": 0.1}  # T3
LORA = {"r": 32, "alpha": 16.0, "dropout": 0.1, "targets": "all-linear"}  # T3, 7B
LORA_13B = {**LORA, "r": 64}  # T3
NF4 = {"type": "nf4", "double": False, "compute_dtype": "bfloat16"}
DOUBLE = {**NF4, "double": True}  # what QLoRA adds

METHODS: dict[str, dict[str, Any]] = {
    "lora-bf16": {"method": "lora", "lora": LORA, "velora": None},
    "lora-nf4": {"method": "qlora", "lora": LORA, "quantization": NF4, "velora": None},
    "qlora": {"method": "qlora", "lora": LORA, "quantization": DOUBLE, "velora": None},
    "qlora+velora": {"method": "qlora", "lora": LORA, "quantization": DOUBLE, "velora": VELORA},
    "qlora+velora-random": {  # every adapter: docs/results/fine-tuning.md
        "method": "qlora",
        "lora": LORA,
        "quantization": DOUBLE,
        "velora": {
            "targets": ["lora_A"],
            "sub_token_size": 4,
            "init": "random",
            "vectors": "per_group",
        },
    },
    # No adapters: the coefficients are pending ones, so that their vectors stay for the whole run.
    "coefficients-nf4": {
        "method": "coefficients",
        "quantization": NF4,
        "velora": {"targets": "all-linear", "num_groups": 32, "fold_every": None},
    },
    "full": {"method": "full", "velora": None},
    # The factored gradient under Adam does not see the scale.
    "full+velora": {
        "method": "full",
        "velora": {"targets": VALUE_AND_DOWN, "num_groups": 32, "track_delta": False},
    },
}
# Chosen by benchmarks/choose_rates.py; T3's 4e-4 is for 4 epochs of 52,000 examples.
LOCAL_LEARNING_RATES = {
    "lora-bf16": 2e-3,
    "lora-nf4": 2e-3,
    "qlora": 2e-3,
    "qlora+velora": 2e-3,
    "qlora+velora-random": 2e-3,
    "coefficients-nf4": 3e-3,
    "full": 5e-4,
    "full+velora": 5e-4,
}
LOCAL_RANK = 16  # for a width of 576; T3's 32 is for 4096

PAPER_MODELS = {"7b": "huggyllama/llama-7b", "13b": "huggyllama/llama-13b"}
PAPER_EPOCHS = {"7b": 4.0, "13b": 3.0}  # T3
PAPER_BATCH, PAPER_LENGTH, PAPER_LEARNING_RATE = 16, 512, 4e-4  # T3
PAPER_FULL_LEARNING_RATE = 2e-5  # Alpaca's own; T3 has no full tuning


def local_recipe(task: str, variant: str, seed: int) -> dict[str, Any]:
    """A cell for two CPU cores: a few minutes."""
    return {
        **_method(variant, seed, {"r": LOCAL_RANK}),
        "model": "smollm2-135m-instruct",
        "dtype": "bfloat16",
        "data": {
            "train": task,
            "template": "Question: {input}\nKind of answer:\n",
            "max_length": 96,
            "max_eval": 100,
            "seed": seed,
        },
        "train": {
            **_optimisation(seed),
            "steps": 64,
            "batch_size": 8,
            "learning_rate": LOCAL_LEARNING_RATES[variant],
            "schedule": "cosine",
            "group_by_length": True,
            "save_final": False,
        },
        # What the model could do before does not depend on the seed of the training.
        "evaluate": {"before": seed == 0, "metric": "choice", "perplexity": "pydoc"},
    }


def paper_recipe(task: str, variant: str, seed: int) -> dict[str, Any]:
    """A cell with the paper's model and data; needs the hub and a GPU of 24 to 80 GB."""
    full = METHODS[variant]["method"] == "full"
    return {
        **_method(variant, seed, {"r": (LORA_13B if task == "13b" else LORA)["r"]}),
        "model": PAPER_MODELS[task],
        "dtype": "bfloat16",
        "data": {
            "train": "tatsu-lab/alpaca",
            "format": "instruction",  # its column "text" has the template applied already
            "template": "alpaca",
            "max_length": PAPER_LENGTH,
            "too_long": "truncate",
            "eval_fraction": 0.01,
        },
        "train": {
            **_optimisation(seed),
            "epochs": PAPER_EPOCHS[task],
            "batch_size": PAPER_BATCH,
            "learning_rate": PAPER_FULL_LEARNING_RATE if full else PAPER_LEARNING_RATE,
            "schedule": "constant",
            "group_by_length": True,
            "save_final": True,  # lm-eval loads it
        },
        "evaluate": {"before": False, "after": False},
    }


def _method(variant: str, seed: int, lora: dict[str, Any]) -> dict[str, Any]:
    settings = with_seed(METHODS[variant], seed)
    if "lora" in settings:
        settings["lora"] = {**settings["lora"], **lora}
    return settings


def _optimisation(seed: int) -> dict[str, Any]:
    return {
        "optimizer": "adamw_torch_fused",
        "warmup": 0.03,  # QLoRA's
        "max_grad_norm": 0.3,  # QLoRA's
        "seed": seed,
        "tensorboard": False,
    }


ALPACA = Bench(
    name="alpaca",
    title="Alpaca protocol: language models that follow instructions",
    variants=VARIANTS,
    scales={
        "local": Scale(("trec-50",), local_recipe, timed="trec-50"),
        "paper": Scale(
            tuple(PAPER_MODELS),
            paper_recipe,
            timed="7b",
            needs=(("lm_eval", lm_evaluation.INSTALL),),
            measure=lm_evaluation.mmlu,
        ),
    },
    notes=(
        "Scores are accuracies in per cent. The perplexity is that of general text after the "
        "training: what it rises by has been forgotten."
    ),
)
