"""What resuming a compressed run needs besides the plain checkpoint: safetensors and JSON.

A checkpoint of a compressed model holds plain weights. Next to it lie the vectors, the counters,
pending coefficients and the configuration, so that a resumed run is the run it would have been.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from velora_torch.layers import CompressedLayer
from velora_torch.layers.base import TENSORS
from velora_torch.model import compressed_layers

TENSOR_FILE = "velora_state.safetensors"
JSON_FILE = "velora_state.json"
FORMAT = "velora-torch/state/1"


def save_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the state of the compressed layers into ``folder``.

    Each file is written whole or not at all: an error (a full disk) leaves the former one.

    Raises:
        ValueError: the model is not compressed.
        OSError: the files cannot be written.
    """
    layers = _layers(model)
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, layer in layers.items():
        layer.settle()
        tensors |= {f"{name}.{key}": value for key, value in _tensors(layer).items()}
        described[name] = {
            "outputs": layer.outputs,
            "features": layer.features,
            "config": layer.velora.config.to_dict(),
            **layer.velora.counters(),
        }
    data = save_tensors(tensors)
    text = {
        "format": FORMAT,
        "sha256": hashlib.sha256(data).hexdigest(),
        "layers": described,
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / TENSOR_FILE, data)
    write_whole(target / JSON_FILE, json.dumps(text, indent=1).encode())


def load_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Give a compressed model the state that :func:`save_state` wrote.

    Load the plain weights first. Nothing of the model is changed unless all of the state fits.

    Raises:
        FileNotFoundError: the folder has no such state.
        ValueError: a file is truncated or changed, or belongs to another model or configuration.
    """
    layers = _layers(model)
    described, tensors = _read(Path(folder))
    _check_layers(layers, described, tensors, folder)
    for name, layer in layers.items():
        _restore_layer(layer, described[name], tensors, name)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: the old content stays until the new one is on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _layers(model: nn.Module) -> dict[str, CompressedLayer]:
    layers = compressed_layers(model)
    if not layers:
        raise ValueError("the model is not compressed: call velora_torch.compress(model) first")
    return layers


def _tensors(layer: CompressedLayer) -> dict[str, Tensor]:
    found = {key: layer._buffers[f"velora_{key}"] for key in TENSORS}
    if layer.velora.pending:
        found["coef"] = layer.coef
    return {k: v.detach().contiguous() for k, v in found.items() if v is not None}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (JSON_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: it is not a checkpoint of a compressed run, or its "
                f"writing was interrupted; use an earlier checkpoint"
            )
    try:
        text = json.loads((folder / JSON_FILE).read_bytes())
        described, expected, form = text["layers"], text["sha256"], text["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / JSON_FILE} is truncated or damaged ({error}); use an earlier checkpoint"
        ) from None
    if form != FORMAT:
        raise ValueError(f"{folder / JSON_FILE} has format {form!r}; this version reads {FORMAT!r}")
    data = (folder / TENSOR_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(
            f"{folder / TENSOR_FILE} is truncated or damaged: its checksum is not the one in "
            f"{JSON_FILE}; use an earlier checkpoint"
        )
    try:
        return described, load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSOR_FILE} is damaged: {error}") from None


def _check_layers(
    layers: dict[str, CompressedLayer],
    described: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: str | os.PathLike[str],
) -> None:
    missing, extra = layers.keys() - described.keys(), described.keys() - layers.keys()
    if missing or extra:
        raise ValueError(
            f"the state in {folder} is for another model or other targets: it lacks "
            f"{len(missing)} layers that are compressed here (such as {min(missing, default='-')})"
            f" and has {len(extra)} that are not (such as {min(extra, default='-')})"
        )
    for name, layer in layers.items():
        there = described[name]
        here = {
            "outputs": layer.outputs,
            "features": layer.features,
            "groups": layer.velora.groups,
            "size": layer.velora.size,
        }
        different = {k: (there.get(k), v) for k, v in here.items() if there.get(k) != v}
        config = layer.velora.config.to_dict()
        saved = there.get("config", {})
        for key in ("init", "vectors", "gradient", "scale", "seed", "refresh_every", "fold_every"):
            if saved.get(key) != config[key]:
                different[key] = (saved.get(key), config[key])
        if different:
            listed = ", ".join(f"{k}: {a!r} there, {b!r} here" for k, (a, b) in different.items())
            raise ValueError(f"the state in {folder} does not fit layer {name!r} ({listed})")
        if f"{name}.vectors" not in tensors:
            raise ValueError(f"the state in {folder} lacks the vectors of layer {name!r}")


@torch.no_grad()
def _restore_layer(
    layer: CompressedLayer, described: dict[str, Any], tensors: dict[str, Tensor], name: str
) -> None:
    device, wide = layer.velora_vectors.device, layer.velora_vectors.dtype
    for key in TENSORS:
        value = tensors.get(f"{name}.{key}")
        layer._buffers[f"velora_{key}"] = None if value is None else value.to(device, wide)
    for key in layer.velora.counters():
        if key not in ("name", "groups", "size"):
            setattr(layer.velora, key, described[key])
    coef = layer._parameters["coef"]
    if coef is not None:
        pending = tensors.get(f"{name}.coef")
        if pending is None:
            coef.zero_()
        else:
            coef.copy_(pending.to(coef.device, coef.dtype))
    layer._unchecked = None
    layer._seen = layer._version_now()
