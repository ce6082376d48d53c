"""Coefficients as a LoRA adapter: coef with the block-diagonal e is B A of rank G."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.atomic import write_whole
from velora_torch.layers import CompressedLayer
from velora_torch.model import compressed_layers

PREFIX = "base_model.model."


def export_lora(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write what training added to the compressed layers as a PEFT LoRA adapter.

    ``PeftModel.from_pretrained(base, path)`` on the weights that the model had when it was
    compressed gives the trained model's outputs. The adapter's rank is ``num_groups``; other
    modules that were trained (norms, biases, embeddings) are stored whole.

    Args:
        model: a compressed model; it is not changed.
        path: folder to write ``adapter_config.json`` and ``adapter_model.safetensors`` to.

    Returns:
        The folder.

    Raises:
        ValueError: the change of the weights is not one low-rank matrix (vectors were redrawn and
            folded, weight decay, dense gradients), or the adapter could not hold all that was
            trained. Nothing is written then.
        ImportError: PEFT is not installed.
    """
    layers = compressed_layers(model)
    for name, layer in layers.items():
        layer.collect()
        reason = _why_not(layer)
        if reason is not None:
            raise ValueError(
                f"cannot export a LoRA adapter: layer {name!r}: {reason}. Save the whole model "
                f"instead (model.save_pretrained, or `velora export` without --lora)"
            )
    _check_model(model, layers)
    whole = _whole_modules(model, layers)
    config = _config(model, layers, whole)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in _factors(layer).items()}
    for name in whole:
        for key, value in model.get_submodule(name).state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = value.detach().contiguous().clone()
    from safetensors.torch import save

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    config.save_pretrained(folder)
    return folder


def _why_not(layer: CompressedLayer) -> str | None:
    state = layer.velora
    if not layer.factors:
        return "it scales features, which is no low-rank change of a matrix"
    if state.config.gradient == "dense":
        return "it was trained with gradient='dense', which keeps no coefficients"
    if state.lost is not None:
        return state.lost
    if state.folds and layer.velora_delta is None:
        return "its coefficients were folded with track_delta=False"
    if state.pending and state.folds and state.delta_direction != state.direction:
        return "optimizers of different kinds have trained it"
    return None


@torch.no_grad()
def _factors(layer: CompressedLayer) -> dict[str, Tensor]:
    """lora_A: the block-diagonal e, (G, D). lora_B: the coefficients, (O, G)."""
    state = layer.velora
    total = layer.coef.detach().clone()
    direction = state.direction
    if layer.velora_delta is not None:
        total += layer.velora_delta
        assert state.delta_direction is not None
        direction = state.delta_direction
    v = layer.velora_vectors
    e_GM = v.sign() if direction == "sign" else v
    a_GD = torch.block_diag(*e_GM.unbind())[:, : layer.features]
    factors = {"lora_A.weight": a_GD.contiguous(), "lora_B.weight": total.contiguous()}
    bias = layer._parameters["bias"]
    if bias is not None and bias.requires_grad:
        factors["base_layer.bias"] = bias.detach().clone()
    return factors


def _check_model(model: nn.Module, layers: dict[str, CompressedLayer]) -> None:
    """Refuse models that PEFT could not give the adapter to."""
    if not layers:
        raise ValueError("cannot export a LoRA adapter: the model is not compressed")
    if hasattr(model, "peft_config"):
        raise ValueError(
            "cannot export a LoRA adapter: this is a PEFT model already; save its adapter with "
            "model.save_pretrained"
        )
    if "" in layers:
        raise ValueError(
            "cannot export a LoRA adapter: the model is itself one compressed layer, and PEFT "
            "adapts layers inside a model. Save the whole model instead"
        )
    compressed = set(layers.values())
    pairs = model.named_modules(remove_duplicate=False)
    names = (name for name, module in pairs if module in compressed)
    again = next((name for name in names if name not in layers), None)
    if again is not None:
        raise ValueError(
            f"cannot export a LoRA adapter: layer {again!r} is the same module as another, and "
            f"PEFT would adapt one of the two. Save the whole model instead"
        )


def _whole_modules(model: nn.Module, layers: dict[str, CompressedLayer]) -> list[str]:
    """Modules whose own parameters were trained whole; the adapter stores them as they are."""
    holders: dict[int, str] = {}
    names = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own or name in layers:
            continue
        tied = [holders[id(p)] for p in own if id(p) in holders]
        if tied:
            raise ValueError(
                f"cannot export a LoRA adapter: {name!r} and {tied[0]!r} share a trained weight, "
                f"which an adapter cannot hold. Freeze it before training "
                f"(model.get_input_embeddings().requires_grad_(False)), or save the whole model"
            )
        if not name or list(module.children()):
            raise ValueError(
                f"cannot export a LoRA adapter: module {name or '(the model itself)'!r} trains "
                f"parameters of its own beside its children's, which an adapter cannot hold"
            )
        holders |= {id(p): name for p in own}
        names.append(name)
    return _all_that_match(model, layers, names)


def _all_that_match(
    model: nn.Module, layers: dict[str, CompressedLayer], whole: list[str]
) -> list[str]:
    """All modules that PEFT takes for one of ``whole``: it looks at the ends of names."""
    matched = [n for n, _ in model.named_modules() if n.endswith(tuple(whole))] if whole else []
    for name in matched:
        inside = [layer for layer in layers if f"{layer}.".startswith(f"{name}.")]
        if inside:
            raise ValueError(
                f"cannot export a LoRA adapter: the trained module {_end_of(name, whole)!r} is to "
                f"be stored whole, and PEFT would take compressed layer {inside[0]!r} for the same "
                f"by the end of its name. Freeze it before training, or save the whole model"
            )
    return matched


def _end_of(name: str, whole: list[str]) -> str:
    return next(end for end in whole if name.endswith(end))


def _targets(model: nn.Module, layers: dict[str, CompressedLayer]) -> list[str] | str:
    """Names of the layers, or a regular expression where an end of a name is ambiguous."""
    ends = tuple(f".{name}" for name in layers)
    others = (name for name, _ in model.named_modules() if name not in layers)
    if not any(name.endswith(ends) for name in others):
        return sorted(layers)
    return "|".join(re.escape(name) for name in sorted(layers))


def _config(model: nn.Module, layers: dict[str, CompressedLayer], whole: list[str]) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("export_lora needs PEFT: pip install 'velora-torch[peft]'") from error
    ranks = {name: layer.velora.groups for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # Keys are regular expressions for the end of a name.
    others = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=_targets(model, layers),
        modules_to_save=whole or None,
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
        base_model_name_or_path=getattr(model, "name_or_path", None),
        inference_mode=True,
    )
