"""From a recipe to a model that is ready to train: loaded, adapted, compressed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from velora_torch.config import VeloraConfig
from velora_torch.model import coefficients, compress
from velora_torch.quiet import quiet as quiet_libraries
from velora_torch.recomputation import checkpoint_blocks, recompute
from velora_torch.remote_code import explain, trust
from velora_torch.training.assets import AssetError, resolve_model
from velora_torch.training.data import PreparedData
from velora_torch.training.methods import apply_method
from velora_torch.training.schema import PEFT_METHODS, Recipe


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
    if recipe.train.shard_checkpoints:
        from velora_torch.integrations.sharded_checkpoint import check_available

        check_available()
    for package, why, install in _needed(recipe):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"{why} needs {package}: pip install '{install}'")


def _needed(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Packages that a recipe needs besides those of `velora train`: name, why, what to install."""
    why = f"method: {recipe.method}"
    if recipe.method in PEFT_METHODS:
        yield "peft", why, "velora-torch[peft]"
    if recipe.quantization is not None:
        yield "bitsandbytes", why, "velora-torch[quantized]"
    if not recipe.is_language_model:
        yield "sklearn", f"task: {recipe.task}", "scikit-learn"
    if recipe.model.startswith("timm/"):
        yield "timm", f"model: {recipe.model}", "timm"
    if recipe.train.optimizer.startswith("galore"):
        yield "galore_torch", f"train.optimizer: {recipe.train.optimizer}", "galore-torch"
    if recipe.train.optimizer.startswith("apollo"):
        yield "apollo_torch", f"train.optimizer: {recipe.train.optimizer}", "apollo-torch"


def quiet() -> None:
    """Silence transformers' progress bars, since the run shows its own, and its deprecations."""
    quiet_libraries()
    from transformers.utils import logging

    logging.disable_progress_bar()


def context(recipe: Recipe) -> int | None:
    """The longest sequence that the recipe's model takes, if its configuration says so."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_model(recipe.model), **trust())
    except (OSError, ValueError) as error:
        raise AssetError(
            f"no configuration for {recipe.model!r}: {explain(recipe.model, error)}"
        ) from None
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def load_tokenizer(recipe: Recipe, report: Callable[[str], None]) -> Any:
    """Load the tokenizer of the recipe's model."""
    from transformers import AutoTokenizer

    source = resolve_model(recipe.model, report)
    try:
        return AutoTokenizer.from_pretrained(source, **trust())
    except (OSError, ValueError) as error:
        raise AssetError(
            f"cannot load the tokenizer of {recipe.model!r}: {explain(recipe.model, error)}"
        ) from None


def load_model(
    recipe: Recipe, report: Callable[[str], None], data: PreparedData | None = None
) -> Any:
    """Load the recipe's model, adapted as its method says, not yet compressed.

    Args:
        recipe: names the model, the task and the method.
        report: shows a line.
        data: says how many classes there are, or which architecture starts from random weights;
            needed for every task but language modeling.
    """
    import torch
    import transformers

    if recipe.task == "pretrain":
        from velora_torch.training.pretraining.architecture import random_model

        assert data is not None
        model = random_model(recipe, data.configuration)
        model.config.use_cache = False
        return apply_method(model, recipe)
    transformers.set_seed(recipe.train.seed)  # heads and adapters are random
    source = resolve_model(recipe.model, report)
    settings: dict[str, Any] = {"dtype": getattr(torch, recipe.dtype), **trust()}
    if recipe.attention is not None:
        settings["attn_implementation"] = recipe.attention
    if recipe.quantization is not None:
        settings["quantization_config"] = _quantization(recipe)
        settings["device_map"] = {"": _device()}
    if recipe.task != "language-modeling":
        assert data is not None
        settings |= _head_settings(recipe, data)
    loader = getattr(transformers, LOADERS[recipe.task])
    try:
        model = loader.from_pretrained(source, **settings)
    except (OSError, ValueError) as error:
        raise AssetError(
            f"cannot load the model {recipe.model!r}: {explain(recipe.model, error)}"
        ) from None
    if recipe.quantization is not None:
        from velora_torch.integrations.bitsandbytes import keep_differentiable

        keep_differentiable(model)
    if recipe.task == "language-modeling":
        model.config.use_cache = False
    return apply_method(model, recipe)


LOADERS = {
    "language-modeling": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "text-regression": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
"""The class of transformers that loads a model for a task."""


def _head_settings(recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    """What a model's new head has to know."""
    # A checkpoint's head for other classes is replaced.
    settings: dict[str, Any] = {"ignore_mismatched_sizes": True}
    if data.classes is None:
        return settings | {"num_labels": 1, "problem_type": "regression"}
    kind = {"problem_type": "single_label_classification"}
    names = dict(enumerate(data.classes))
    places = {name: place for place, name in names.items()}
    return settings | kind | {"num_labels": len(names), "id2label": names, "label2id": places}


def compress_for(recipe: Recipe, model: Any) -> Any:
    """Compress the model as the recipe says; unchanged where `velora` is null."""
    if recipe.velora is not None:
        compress(model, VeloraConfig(**recipe.velora.to_kwargs()))
    return model


def parameters_in(model: nn.Module, pattern: str) -> Iterator[nn.Parameter]:
    """Parameters of all layers whose full name a regular expression matches, as a whole."""
    for name, module in model.named_modules():
        if re.fullmatch(pattern, name):
            yield from module.parameters()


def _trained_name(model: nn.Module) -> str:
    """The name of a layer that trains something, for an error."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return trained[-1].rpartition(".")[0]


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
    if recipe.train.coefficient_learning_rate is not None and not coefficients(model):
        raise ModelError(
            f"train.coefficient_learning_rate: nothing that method: {recipe.method} trains has "
            f"coefficients; remove it"
        )
    for pattern in train.learning_rates:
        if not any(p.requires_grad for p in parameters_in(model, pattern)):
            raise ModelError(
                f"train.learning_rates: no layer whose full name matches {pattern!r} trains "
                f"anything; names are such as {_trained_name(model)!r}"
            )
    every = train.gradient_checkpointing
    if every and every is not True:
        try:
            checkpoint_blocks(model, every)
        except ValueError as error:
            raise ModelError(f"train.gradient_checkpointing: {_first(error)}") from None
        if recipe.method != "full" and recipe.is_language_model:
            model.enable_input_require_grads()
    return model


def _quantization(recipe: Recipe) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    assert recipe.quantization is not None
    if recipe.quantization.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
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
