"""From a recipe to a model that is ready to train: loaded, adapted, compressed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from velora_torch.config import VeloraConfig
from velora_torch.model import compress
from velora_torch.recomputation import checkpoint_blocks, recompute
from velora_torch.training.assets import AssetError, resolve_model
from velora_torch.training.schema import Recipe


class ModelError(ValueError):
    """A model cannot be loaded, or not in the way that the recipe asks for."""


def check_settings(recipe: Recipe) -> None:
    """Check what needs no model: the compression's settings, and the packages of the method.

    Raises:
        ModelError: a package is missing, or settings contradict each other.
    """
    if recipe.velora is not None:
        try:
            VeloraConfig(**recipe.velora.to_kwargs())
        except ValueError as error:
            raise ModelError(f"velora: {error}") from None
    needed = {"full": (), "lora": ("peft",), "qlora": ("peft", "bitsandbytes")}[recipe.method]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"method: {recipe.method} needs {package}: "
                f"pip install 'velora-torch[peft,quantized]'"
            )


def quiet() -> None:
    """Silence transformers' progress bars; the run shows its own."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    # Deprecated names that the libraries around use among themselves.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def context(recipe: Recipe) -> int | None:
    """The longest sequence that the recipe's model takes, if its configuration says so."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_model(recipe.model))
    except (OSError, ValueError) as error:
        raise AssetError(f"no configuration for {recipe.model!r}: {_first(error)}") from None
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def load_tokenizer(recipe: Recipe, report: Callable[[str], None]) -> Any:
    """Load the tokenizer of the recipe's model."""
    from transformers import AutoTokenizer

    source = resolve_model(recipe.model, report)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AssetError(
            f"cannot load the tokenizer of {recipe.model!r}: {_first(error)}"
        ) from None


def load_model(recipe: Recipe, report: Callable[[str], None]) -> Any:
    """Load the recipe's model, with adapters where it asks for them, not yet compressed."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(recipe.train.seed)  # new adapters are random
    source = resolve_model(recipe.model, report)
    settings: dict[str, Any] = {"dtype": getattr(torch, recipe.dtype)}
    if recipe.method == "qlora":
        settings["quantization_config"] = _quantization(recipe)
        settings["device_map"] = {"": _device()}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **settings)
    except (OSError, ValueError) as error:
        raise AssetError(f"cannot load the model {recipe.model!r}: {_first(error)}") from None
    if recipe.method == "qlora":
        from velora_torch.integrations.bitsandbytes import keep_differentiable

        keep_differentiable(model)
    model.config.use_cache = False
    return model if recipe.method == "full" else _with_adapters(model, recipe)


def compress_for(recipe: Recipe, model: Any) -> Any:
    """Compress the model as the recipe says; unchanged where `velora` is null."""
    if recipe.velora is not None:
        compress(model, VeloraConfig(**recipe.velora.to_kwargs()))
    return model


def save_memory(recipe: Recipe, model: Any) -> Any:
    """Recompute, compress and checkpoint as the recipe says.

    Checkpointing of all blocks is the trainer's.
    """
    train = recipe.train
    if train.recompute or train.chunked_loss:
        recompute(
            model, norms=train.recompute, activations=train.recompute, loss=train.chunked_loss
        )
    compress_for(recipe, model)
    every = train.gradient_checkpointing
    if every and every is not True:
        try:
            checkpoint_blocks(model, every)
        except ValueError as error:
            raise ModelError(f"train.gradient_checkpointing: {_first(error)}") from None
        if recipe.method != "full":
            model.enable_input_require_grads()
    return model


def _with_adapters(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    assert recipe.lora is not None
    if recipe.method == "qlora":
        # Gradient checkpointing is the trainer's; embeddings' outputs need a gradient for it.
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=recipe.train.gradient_checkpointing is True
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.targets,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora.targets: {_first(error)}") from None


def _quantization(recipe: Recipe) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    assert recipe.quantization is not None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quantization.type,
        bnb_4bit_use_double_quant=recipe.quantization.double,
        bnb_4bit_compute_dtype=getattr(torch, recipe.quantization.compute_dtype),
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
