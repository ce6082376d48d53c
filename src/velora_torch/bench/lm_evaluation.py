"""MMLU, five-shot, by EleutherAI's lm-eval: the score of the paper's table T3."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from velora_torch.training.recipe import Recipe

INSTALL = "pip install lm-eval"
SHOTS = 5


def mmlu(recipe: Recipe) -> Mapping[str, float]:
    """Score the finished run of a recipe.

    Args:
        recipe: its `train.output` holds the run, whose final/ is a checkpoint or adapters.

    Returns:
        {"mmlu": accuracy between 0 and 1}.

    Raises:
        ValueError: lm-eval is not installed, or gives no such score.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"MMLU needs lm_eval: {INSTALL}")
    import lm_eval  # type: ignore[import-not-found]

    answer = lm_eval.simple_evaluate(
        model="hf",
        model_args=model_arguments(recipe),
        tasks=["mmlu"],
        num_fewshot=SHOTS,
        batch_size="auto",
    )
    found = (answer or {}).get("results", {}).get("mmlu", {})
    if "acc,none" not in found:
        raise ValueError("lm-eval has returned no accuracy on mmlu")
    return {"mmlu": float(found["acc,none"])}


def model_arguments(recipe: Recipe) -> dict[str, object]:
    """What lm-eval's "hf" loads: the final checkpoint, or its adapters on the base they have
    trained on."""
    final = Path(recipe.train.output) / "final"
    arguments: dict[str, object] = {"dtype": recipe.dtype}
    if not (final / "adapter_config.json").is_file():
        return {**arguments, "pretrained": str(final)}
    arguments |= {"pretrained": recipe.model, "peft": str(final)}
    quantization = recipe.quantization
    if quantization is None:
        return arguments
    if quantization.type == "int8":
        return {**arguments, "load_in_8bit": True}
    return {
        **arguments,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantization.type,
        "bnb_4bit_use_double_quant": quantization.double,
        "bnb_4bit_compute_dtype": quantization.compute_dtype,
    }
