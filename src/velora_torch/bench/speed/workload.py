"""The model of a case with random weights, and its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.bench.speed.cases import Case

SEED = 0


@dataclass
class Workload:
    """What a step computes before the optimizer's turn."""

    model: nn.Module
    """Plain and untouched; variants are made from copies."""
    inputs: dict[str, Tensor]
    gradients: Callable[[nn.Module], Tensor]
    """Forward and backward pass of a model on the inputs; returns the loss, or the output."""


def build(case: Case) -> Workload:
    """Make the model and the batch of a case, the same ones each time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        if case.settings["family"] == "linear":
            return _linear(case.settings, device)
        model = _transformer(case.settings)
        inputs = _batch(model.config, case.settings)
    model = model.to(device).train()
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}

    def gradients(model: nn.Module) -> Tensor:
        loss: Tensor = model(**inputs).loss
        loss.backward()
        return loss.detach()

    return Workload(model, inputs, gradients)


def _linear(settings: Mapping[str, Any], device: str) -> Workload:
    dtype = getattr(torch, settings["dtype"])
    features, outputs, tokens = (settings[key] for key in ("features", "outputs", "tokens"))
    layer = nn.Linear(features, outputs, bias=False, dtype=dtype, device=device)
    # The mean token must not be zero: it gives the vectors.
    x_TD = (torch.randn(tokens, features, device=device) + 0.1).to(dtype).requires_grad_()
    dY_TO = (torch.randn(tokens, outputs, device=device) / tokens).to(dtype)

    def gradients(model: nn.Module) -> Tensor:
        y_TO: Tensor = model(x_TD)
        y_TO.backward(dY_TO)
        x_TD.grad = None
        return y_TO.detach()

    return Workload(nn.Sequential(layer).train(), {"x": x_TD, "dY": dY_TO}, gradients)


def _transformer(settings: Mapping[str, Any]) -> Any:
    import transformers

    config = _config(settings)
    (architecture,) = config.architectures
    task = architecture.partition("For")[2]
    auto = getattr(transformers, f"AutoModelFor{task}")
    return auto.from_config(config, dtype=getattr(torch, settings["dtype"]))


def _config(settings: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig

    from velora_torch.memory.simulator.presets import preset

    if settings["family"] == "llama":
        config: Any = LlamaConfig(**settings["config"], tie_word_embeddings=False)
        config.architectures = ["LlamaForCausalLM"]
        config.use_cache = False
        return config
    config = preset(settings["preset"])
    # Without dropout all variants compute the same, up to VeLoRA's own approximation.
    quiet = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
    change = {name: 0.0 for name in quiet if getattr(config, name, None) is not None}
    for name, value in {**change, **settings["change"], "use_cache": False}.items():
        setattr(config, name, value)
    return config


def _batch(config: Any, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    size, length = settings["batch"], settings["length"]
    task = config.architectures[0].partition("For")[2]
    if task == "ImageClassification":
        shape = (size, config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(shape).to(getattr(torch, settings["dtype"]))
        return {"pixel_values": pixels, "labels": torch.randint(config.num_labels, (size,))}
    ids = torch.randint(3, config.vocab_size, (size, length))
    if task == "CausalLM":
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "labels": torch.randint(config.num_labels, (size,))}
