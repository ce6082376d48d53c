"""A model with random weights, of an architecture that has a name or a config.json."""

from __future__ import annotations

from typing import Any

from velora_torch.memory.simulator.architecture import resolve
from velora_torch.remote_code import trust
from velora_torch.training.assets import AssetError
from velora_torch.training.schema import Recipe
from velora_torch.training.sources import DataError


def configuration(recipe: Recipe) -> Any:
    """The architecture that the recipe names: a preset, a config.json, its folder, or a hub id.

    Raises:
        AssetError: there is none of that name, or it is not one of a causal language model.
        DataError: sequences are longer than the architecture's context.
    """
    from transformers import AutoModelForCausalLM

    try:
        architecture = resolve(recipe.model)
    except ValueError as error:
        raise AssetError(f"model: {error}") from None
    config: Any = architecture.config
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise AssetError(
            f"model: {recipe.model!r} is a {config.model_type}, and transformers has no causal "
            f"language model of that architecture; pre-training needs one, such as llama-60m"
        )
    limit = architecture.positions
    if limit is not None and recipe.data.max_length > limit:
        raise DataError(
            f"data.max_length is {recipe.data.max_length}, but the context of {recipe.model} is "
            f"{limit} tokens; set data.max_length={limit} or less"
        )
    return config


def for_tokenizer(config: Any, tokenizer: Any) -> Any:
    """Give an architecture the vocabulary and the special tokens of a tokenizer, in place.

    It is no longer that of a model which lies somewhere, and loses the name of one.
    """
    config.name_or_path = ""
    text = config.get_text_config()
    text.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id"):
        setattr(text, name, getattr(tokenizer, name))
    # Padding's embedding stays zero, and the end of a text, which pads too, is to be learnt.
    pad = tokenizer.pad_token_id
    text.pad_token_id = None if pad == tokenizer.eos_token_id else pad
    return config


def random_model(recipe: Recipe, config: Any) -> Any:
    """A model of an architecture, drawn in float32 by the recipe's seed, in the recipe's type."""
    import torch
    import transformers

    transformers.set_seed(recipe.train.seed)
    settings = {} if recipe.attention is None else {"attn_implementation": recipe.attention}
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, **settings, **trust()
    )
    return model.to(getattr(torch, recipe.dtype))
