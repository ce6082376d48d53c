"""Vision: the protocol of VTAB-1k, the paper's table T1.

1000 training examples per task; rows with and without VeLoRA for full tuning, SSF, Hydra and LoRA,
and linear probing. The paper trains a ViT-B/16 of timm on 16 of VTAB's data sets ("paper"). Here
("local") it is DINOv2-S at 112 pixels, 65 tokens, on the packaged tasks.
"""

from __future__ import annotations

from typing import Any

from velora_torch.bench.grid import Bench, Scale, Variant, with_seed
from velora_torch.training.packaged.images import IMAGE_TASKS

VARIANTS = (
    Variant("linear-probe", "Linear probing"),
    Variant("full", "Full"),
    Variant("full+velora", "Full + VeLoRA", "full"),
    Variant("full+velora-all", "Full + VeLoRA, all linear layers", "full"),
    Variant("ssf", "SSF"),
    Variant("ssf+velora", "SSF + VeLoRA", "ssf"),
    Variant("hydra", "Hydra"),
    Variant("hydra+velora", "Hydra + VeLoRA", "hydra"),
    Variant("lora", "LoRA"),
    Variant("lora+velora", "LoRA + VeLoRA", "lora"),
    Variant("lora+velora-random", "LoRA + VeLoRA, random v, M = 4", "lora"),
)

# Names cover DINOv2 and ViT of transformers and the ViTs of timm, whose query, key and value are
# one layer. Full: value and down projections (T3, T4, T6). Adapters: where T1 puts VeLoRA, on
# their down projections; SSF: on the scale-and-shift layers.
FULL_TARGETS = r".*\.(v_proj|value|attn\.qkv|fc2)"
SSF_TARGETS = ["ssf"]
HYDRA_TARGETS = ["hydra_A"]
LORA_TARGETS = ["lora_A"]
# Which layers get adapters the paper does not say. LoRA: query and value, as in its own paper.
# Hydra: the projections that end attention and MLP, as in its own paper.
LORA_LAYERS = r".*\.(q_proj|v_proj|query|value|attn\.qkv)"
HYDRA_LAYERS = r".*\.(o_proj|attn\.proj|fc2)"

RANDOM = {"sub_token_size": 4, "init": "random", "vectors": "per_group"}

METHODS: dict[str, dict[str, Any]] = {  # sub-token sizes and ranks: T10
    "linear-probe": {"method": "linear-probe", "velora": None},
    "full": {"method": "full", "velora": None},
    "full+velora": {
        "method": "full",
        "velora": {"targets": FULL_TARGETS, "sub_token_size": 32, "track_delta": False},
    },
    # What the factored gradient adds to the paper: every linear layer, random vectors redrawn.
    "full+velora-all": {
        "method": "full",
        "velora": {
            "targets": "all-linear",
            "sub_token_size": 8,
            "init": "random",
            "vectors": "per_group",
            "refresh_every": 10,
            "track_delta": False,
        },
    },
    "ssf": {"method": "ssf", "velora": None},
    "ssf+velora": {"method": "ssf", "velora": {"targets": SSF_TARGETS, "sub_token_size": 32}},
    "hydra": {"method": "hydra", "hydra": {"r": 4, "targets": HYDRA_LAYERS}, "velora": None},
    "hydra+velora": {
        "method": "hydra",
        "hydra": {"r": 4, "targets": HYDRA_LAYERS},
        "velora": {"targets": HYDRA_TARGETS, "sub_token_size": 4},
    },
    # alpha = rank: the scale of an adapter does not change with its rank.
    "lora": {
        "method": "lora",
        "lora": {"r": 4, "alpha": 4.0, "dropout": 0.0, "targets": LORA_LAYERS},
        "velora": None,
    },
    "lora+velora": {
        "method": "lora",
        "lora": {"r": 16, "alpha": 16.0, "dropout": 0.0, "targets": LORA_LAYERS},
        "velora": {"targets": LORA_TARGETS, "sub_token_size": 16},
    },
    "lora+velora-random": {  # rank of the plain row
        "method": "lora",
        "lora": {"r": 4, "alpha": 4.0, "dropout": 0.0, "targets": LORA_LAYERS},
        "velora": {"targets": LORA_TARGETS, **RANDOM},
    },
}
# Chosen by benchmarks/choose_rates.py; with VeLoRA no other rate was better than the method's own.
LOCAL_LEARNING_RATES = {
    "linear-probe": 1e-2,
    "full": 1e-5,
    "ssf": 2e-3,
    "hydra": 2e-3,
    "lora": 2e-3,
}
LOCAL_COEFFICIENT_RATES = {"full+velora-all": 4e-5}
TRAINING_EXAMPLES = 1000  # VTAB-1k
TEST_EXAMPLES = 300
WEIGHT_DECAY = 1e-4  # T1

# Name in T1 -> the data set on the hub, and how it names things. Its protocol draws 1000 of the
# training examples. Ids with a "?" behind them were not looked up: the run says so if one fails.
PAPER_DATA: dict[str, dict[str, Any]] = {
    "caltech101": {"train": "dpdl-benchmark/caltech101"},  # ?
    "cifar100": {
        "train": "uoft-cs/cifar100",
        "columns": {"image": "img", "label": "fine_label"},
    },
    "dtd": {"train": "tanganke/dtd"},
    "flowers102": {"train": "dpdl-benchmark/oxford_flowers102"},  # ?
    "pets": {"train": "timm/oxford-iiit-pet", "columns": {"label": "label"}},
    "svhn": {"train": "ufldl-stanford/svhn", "subset": "cropped_digits"},
    "sun397": {"train": "tanganke/sun397"},
    "camelyon": {"train": "dpdl-benchmark/patch_camelyon"},  # ?
    "eurosat": {"train": "tanganke/eurosat"},
    "resisc45": {"train": "tanganke/resisc45"},
    "retinopathy": {"train": "dpdl-benchmark/diabetic_retinopathy_detection"},  # ?
    "clevr-count": {"train": "dpdl-benchmark/clevr_count_all"},  # ?
    "dmlab": {"train": "dpdl-benchmark/dmlab"},  # ?
    "kitti-dist": {"train": "dpdl-benchmark/kitti_closest_vehicle_distance"},  # ?
    "snorb-azim": {
        "train": "dpdl-benchmark/smallnorb",  # ?
        "columns": {"label": "label_azimuth"},
    },
    "snorb-ele": {
        "train": "dpdl-benchmark/smallnorb",  # ?
        "columns": {"label": "label_elevation"},
    },
}
PAPER_LEARNING_RATE = 5e-4  # T1
PAPER_EPOCHS, PAPER_BATCH = 100, 64  # ours: the paper does not say; SSF and Hydra train so


def local_recipe(task: str, variant: str, seed: int) -> dict[str, Any]:
    """A cell for two CPU cores: one to four minutes."""
    return {
        **with_seed(METHODS[variant], seed),
        "model": "dinov2-s",
        "dtype": "float32",
        "attention": "eager",  # on a CPU faster than the fused one for 65 tokens
        "task": "image-classification",
        "data": {
            "train": task,
            "image_size": 112,  # 64 patches
            "max_train": TRAINING_EXAMPLES,
            "max_eval": TEST_EXAMPLES,
            "seed": seed,  # draws the training examples; the test examples stay
        },
        "train": {
            **_optimisation(seed),
            "epochs": 1.0,
            "batch_size": 16,  # 63 steps
            "learning_rate": LOCAL_LEARNING_RATES[variant.partition("+")[0]],
            "coefficient_learning_rate": LOCAL_COEFFICIENT_RATES.get(variant),
            "head_learning_rate": 3e-3,  # the head is new, and 63 steps are few
            "autocast": True,
        },
        "evaluate": {"before": False, "batch_size": 50},
    }


def paper_recipe(task: str, variant: str, seed: int) -> dict[str, Any]:
    """A cell with the paper's model and data; needs the hub and a GPU."""
    return {
        **with_seed(METHODS[variant], seed),
        "model": "timm/vit_base_patch16_224.augreg_in21k",
        "dtype": "float32",
        "task": "image-classification",
        "data": {
            "train_split": "train",
            "eval_split": "test",
            **PAPER_DATA[task],
            "image_size": 224,
            "max_train": TRAINING_EXAMPLES,
            "seed": seed,
        },
        "train": {
            **_optimisation(seed),
            "epochs": float(PAPER_EPOCHS),
            "batch_size": PAPER_BATCH,
            "learning_rate": PAPER_LEARNING_RATE,
            "autocast": True,
        },
        "evaluate": {"before": False, "batch_size": 128},
    }


def _optimisation(seed: int) -> dict[str, Any]:
    return {
        "optimizer": "adamw_torch_fused",
        "weight_decay": WEIGHT_DECAY,
        "schedule": "cosine",
        "warmup": 0.1,
        "seed": seed,
        "save_final": False,
        "tensorboard": False,
    }


VTAB = Bench(
    name="vtab",
    title="VTAB-1k protocol: vision transformers, 1000 training examples per task",
    variants=VARIANTS,
    scales={
        "local": Scale(IMAGE_TASKS, local_recipe, timed=IMAGE_TASKS[0]),
        "paper": Scale(tuple(PAPER_DATA), paper_recipe, timed="cifar100"),
    },
    notes="Scores are accuracies on the test examples, in per cent.",
)
