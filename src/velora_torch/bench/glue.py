"""Language, encoders: the protocol of GLUE, the paper's table T2.

The paper trains RoBERTa-base on eight tasks of GLUE ("paper"). Here ("local") it is MiniLM, 6
layers of width 384, on the packaged text tasks: classification and one regression.
"""

from __future__ import annotations

from typing import Any

from velora_torch.bench.grid import Bench, Scale, Variant, with_seed

VARIANTS = (
    Variant("full", "Full"),
    Variant("galore", "GaLore", "full"),
    Variant("lora", "LoRA"),
    Variant("lora+velora", "LoRA + VeLoRA", "lora"),
    Variant("lora+velora-random", "LoRA + VeLoRA, random v, M = 4", "lora"),
    Variant("velora", "VeLoRA", "full"),
    Variant("velora-all", "VeLoRA, all linear layers", "full"),
)
BLOCKS = r".*\.encoder\.layer\.\d+\."
# The value projection, and the MLP's second layer: "down" of T3 and T4 in BERT's names.
VALUE_AND_DOWN = BLOCKS + r"(attention\.self\.value|output\.dense)"
# All six linear layers of a block; the head of the task, which is new, stays exact.
ALL_LINEAR = (
    BLOCKS + r"(attention\.self\.(query|key|value)|attention\.output\.dense|"
    r"intermediate\.dense|output\.dense)"
)
M = 16  # T2

_LORA = {"r": 8, "alpha": 8.0, "dropout": 0.0, "targets": ALL_LINEAR}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "velora": None},
    "galore": {"method": "full", "velora": None},
    "lora": {"method": "lora", "lora": _LORA, "velora": None},
    "lora+velora": {
        "method": "lora",
        "lora": _LORA,
        "velora": {"targets": ["lora_A"], "sub_token_size": M},
    },
    "lora+velora-random": {  # see docs/results/fine-tuning.md
        "method": "lora",
        "lora": _LORA,
        "velora": {
            "targets": ["lora_A"],
            "sub_token_size": 4,
            "init": "random",
            "vectors": "per_group",
        },
    },
    "velora": {
        "method": "full",
        "velora": {"targets": VALUE_AND_DOWN, "sub_token_size": M, "track_delta": False},
    },
    # What the factored gradient adds to the paper: every linear layer, random vectors redrawn.
    "velora-all": {
        "method": "full",
        "velora": {
            "targets": ALL_LINEAR,
            "sub_token_size": M,
            "init": "random",
            "vectors": "per_group",
            "refresh_every": 50,
            "track_delta": False,
        },
    },
}
GALORE = {  # GaLore's own settings for GLUE: rank 4, scale 4
    "optimizer": "galore_adamw",
    "optimizer_targets": ALL_LINEAR,
}
LOCAL_GALORE = {**GALORE, "optimizer_settings": {"rank": 4, "update_proj_gap": 50, "scale": 4.0}}
PAPER_GALORE = {
    **GALORE,
    "optimizer_settings": {"rank": 4, "update_proj_gap": 500, "scale": 4.0},
    "eps": 1e-6,  # that of galore_torch
}

LOCAL_TASKS = {  # task -> the longest text in tokens; longer ones are cut
    "trec": 64,
    "trec-50": 64,
    "sms-spam": 64,
    "20-newsgroups": 64,
    "vader": 64,
    "vader-polarity": 64,
}
LOCAL_REGRESSIONS = ("vader",)
LOCAL_LEARNING_RATES = {  # chosen by benchmarks/choose_rates.py for the rows without VeLoRA
    "full": 4e-4,
    "galore": 5e-4,
    "lora": 4e-3,
    "lora+velora": 4e-3,
    "lora+velora-random": 4e-3,
    "velora": 4e-4,
    "velora-all": 8e-4,
}

PAPER_TASKS: dict[str, dict[str, Any]] = {  # columns of GLUE, and the score that T2 shows
    "cola": {"text": "sentence", "metric": "matthews"},
    "stsb": {"text": "sentence1", "text_pair": "sentence2", "metric": "pearson"},
    "mrpc": {"text": "sentence1", "text_pair": "sentence2", "metric": "f1"},
    "rte": {"text": "sentence1", "text_pair": "sentence2", "metric": "accuracy"},
    "sst2": {"text": "sentence", "metric": "accuracy"},
    "mnli": {"text": "premise", "text_pair": "hypothesis", "metric": "accuracy"},
    "qnli": {"text": "question", "text_pair": "sentence", "metric": "accuracy"},
    "qqp": {"text": "question1", "text_pair": "question2", "metric": "accuracy"},
}
PAPER_LEARNING_RATES = {"cola": 3e-5, "mrpc": 3e-5}  # T2; 1e-5 for all others
PAPER_BATCHES = {"cola": 32}  # T2; 16 for all others
PAPER_EPOCHS, PAPER_LENGTH = 30.0, 512  # T2


def local_recipe(task: str, variant: str, seed: int) -> dict[str, Any]:
    """A cell for two CPU cores: half a minute to two."""
    regression = task in LOCAL_REGRESSIONS
    return {
        **with_seed(METHODS[variant], seed),
        "model": "minilm-l6",
        "dtype": "float32",
        "task": "text-regression" if regression else "text-classification",
        "data": {
            "train": task,
            "max_length": LOCAL_TASKS[task],
            "too_long": "truncate",
            "max_train": 1000,
            "max_eval": 500,
            "seed": seed,
        },
        "train": {
            **_optimisation(seed),
            "epochs": 3.0,
            "batch_size": 32,
            "learning_rate": LOCAL_LEARNING_RATES[variant],
            "head_learning_rate": 3e-3,  # the head is new, and 96 steps are few
            "autocast": True,
            "group_by_length": True,
            **(LOCAL_GALORE if variant == "galore" else {}),
        },
        "evaluate": {"before": False, "batch_size": 50},
    }


def paper_recipe(task: str, variant: str, seed: int) -> dict[str, Any]:
    """A cell with the paper's model and data; needs the hub and a GPU."""
    columns = {key: value for key, value in PAPER_TASKS[task].items() if key != "metric"}
    return {
        **with_seed(METHODS[variant], seed),
        "model": "FacebookAI/roberta-base",
        "dtype": "float32",
        "task": "text-regression" if task == "stsb" else "text-classification",
        "data": {
            "train": "nyu-mll/glue",
            "subset": task,
            "eval_split": "validation_matched" if task == "mnli" else "validation",
            "columns": {**columns, "label": "label"},
            "max_length": PAPER_LENGTH,
            "too_long": "truncate",
        },
        "train": {
            **_optimisation(seed),
            "epochs": PAPER_EPOCHS,
            "batch_size": PAPER_BATCHES.get(task, 16),
            "learning_rate": PAPER_LEARNING_RATES.get(task, 1e-5),
            "autocast": True,
            **(PAPER_GALORE if variant == "galore" else {}),
        },
        "evaluate": {"before": False, "metric": PAPER_TASKS[task]["metric"], "batch_size": 64},
    }


def _optimisation(seed: int) -> dict[str, Any]:
    return {
        "optimizer": "adamw_torch_fused",
        "schedule": "linear",
        "warmup": 0.1,
        "seed": seed,
        "save_final": False,
        "tensorboard": False,
    }


GLUE = Bench(
    name="glue",
    title="GLUE protocol: text encoders",
    variants=VARIANTS,
    scales={
        "local": Scale(tuple(LOCAL_TASKS), local_recipe, timed="20-newsgroups"),
        "paper": Scale(tuple(PAPER_TASKS), paper_recipe, timed="mrpc"),
    },
    notes=(
        "Scores are accuracies in per cent; the correlation (Pearson's r) times 100 on vader and "
        "stsb, that of Matthews on cola, F1 on mrpc."
    ),
)
