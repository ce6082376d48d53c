"""What resuming a compressed run needs besides the plain checkpoint: safetensors and JSON.

A checkpoint of a compressed model holds plain weights. Next to it lie the vectors, the counters,
pending coefficients and the configuration, so that a resumed run is the run it would have been:

    velora_state.json                counters and configuration; names the tensor file
    velora_state-<hash>.safetensors  vectors and coefficients

The JSON file is written last and whole, and says which tensors belong to it: whenever writing is
cut off, the folder holds the former state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from velora_torch import ranks
from velora_torch.atomic import write_whole
from velora_torch.config import VeloraConfig
from velora_torch.layers import CompressedLayer
from velora_torch.layers.adapter import compressed_adapters
from velora_torch.layers.state import TENSORS
from velora_torch.model import compressed_layers
from velora_torch.sharding import as_sharded, copy_whole_, whole
from velora_torch.state_check import check_adapter_state, check_layer_state

JSON_FILE = "velora_state.json"
TENSOR_FILE = "velora_state-*.safetensors"
"""A pattern: the name has a part of the checksum in it."""
FORMAT = "velora-torch/state/1"
SIZES = ("targets", "num_groups", "sub_token_size")
"""Configuration that is compared by what came of it: the layers, and their groups."""


def save_state(model: nn.Module, folder: str | os.PathLike[str], write: bool | None = None) -> None:
    """Write the state of the compressed layers into ``folder``.

    Where parameters are sharded, every rank must call it. It does not depend on their number: any
    other number of ranks can load it.

    Belongs to the plain weights that ``model.state_dict()`` gives before the next optimizer step;
    both merge pending coefficients into the weights, in either order. Only ``fold_every=None``
    keeps them apart, and then the weights without them are saved here too.

    The state is written whole or not at all: an error (a full disk) leaves the former one.

    Args:
        model: a compressed model.
        folder: where to write.
        write: whether this process is the one that writes; by default the first of all is.

    Raises:
        ValueError: the model is not compressed.
        OSError: the files cannot be written.
    """
    layers = _layers(model)
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, layer in layers.items():
        layer.prepare_to_save()
        tensors |= {f"{name}.{key}": value for key, value in _tensors(layer).items()}
        described[name] = {
            "outputs": layer.outputs,
            "features": layer.features,
            "config": layer.velora.config.to_dict(),
            **layer.velora.counters(),
        }
    for name, adapter in compressed_adapters(model).items():
        tensors |= {f"{name}.{key}": value for key, value in adapter.tensors().items()}
        described[name] = adapter.described()
    if not (ranks.is_first() if write is None else write):
        return
    data = save_tensors(tensors)
    checksum = _checksum(described, data)
    name = TENSOR_FILE.replace("*", checksum[:16])
    text = {"format": FORMAT, "tensors": name, "sha256": checksum, "layers": described}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    is_new = not (target / name).exists()
    try:
        write_whole(target / name, data)
        write_whole(target / JSON_FILE, json.dumps(text, indent=1).encode())
    except BaseException:
        if is_new:
            (target / name).unlink(missing_ok=True)
        raise
    for file in target.glob(TENSOR_FILE):
        if file.name != name:
            file.unlink()


def load_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Give a compressed model the state that :func:`save_state` wrote.

    Load the plain weights first. Nothing of the model is changed unless all of the state fits.

    Raises:
        FileNotFoundError: the folder has no such state.
        ValueError: a file is truncated or changed, or belongs to another model or configuration.
    """
    layers = _layers(model)
    described, tensors = _read(Path(folder))
    adapters = compressed_adapters(model)
    _check_names({**layers, **adapters}, described, folder)
    _check_layers(layers, described, folder)
    for name, adapter in adapters.items():
        _check_config(name, adapter.velora_adapter.config, described[name], {}, folder)
        check_adapter_state(name, adapter, described[name], tensors)
    for name, layer in layers.items():
        check_layer_state(name, layer, described[name], tensors)
    for name, adapter in adapters.items():
        start = f"{name}."
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        adapter.load(described[name], own)
    for name, layer in layers.items():
        _restore_layer(layer, described[name], tensors, name)


def _layers(model: nn.Module) -> dict[str, CompressedLayer]:
    layers = compressed_layers(model)
    if not (layers or compressed_adapters(model)):
        raise ValueError("the model is not compressed: call velora_torch.compress(model) first")
    return layers


def _tensors(layer: CompressedLayer) -> dict[str, Tensor]:
    found = {key: layer._buffers[f"velora_{key}"] for key in TENSORS}
    if layer.velora.pending:
        found["coef"] = layer.coef
        # state_dict() gives the weight with the coefficients in it; rounding cannot be undone.
        if layer.foldable:
            found["base"] = layer.raw_weight
    return {k: whole(v.detach()).contiguous() for k, v in found.items() if v is not None}


def _checksum(described: dict[str, Any], data: bytes) -> str:
    """SHA-256 of both files' content."""
    counters = json.dumps(described, sort_keys=True).encode()
    return hashlib.sha256(counters + data).hexdigest()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / JSON_FILE
    data = _bytes_of(path)
    try:
        text = json.loads(data)
        form, name = text["format"], text["tensors"]
        described, expected = text["layers"], text["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, repr(error)) from None
    if form != FORMAT:
        raise ValueError(f"{path} has format {_shown(form)}; this version reads {FORMAT!r}")
    if not (isinstance(described, dict) and all(map(_has_config, described.values()))):
        raise _damaged(path, "its layers are no objects with a configuration")
    # A name alone: a state cannot name a file of another folder.
    if not (isinstance(name, str) and fnmatchcase(name, TENSOR_FILE) and Path(name).name == name):
        raise _damaged(path, f"it names the tensor file {_shown(name)}, which is not {TENSOR_FILE}")
    tensors = _bytes_of(path.parent / name)
    if _checksum(described, tensors) != expected:
        raise ValueError(
            f"{path} or {name} next to it is truncated or damaged: the checksum of their content "
            f"is not the one that was saved; use an earlier checkpoint"
        )
    try:
        return described, load_tensors(tensors)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path.parent / name, repr(error)) from None


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is truncated or damaged ({what}); use an earlier checkpoint")


def _has_config(described: Any) -> bool:
    return isinstance(described, dict) and isinstance(described.get("config"), dict)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _bytes_of(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: this is not a checkpoint of a compressed run, or its writing was "
            f"interrupted; use an earlier checkpoint"
        )
    return path.read_bytes()


def _check_names(
    layers: dict[str, Any], described: dict[str, Any], folder: str | os.PathLike[str]
) -> None:
    missing, extra = layers.keys() - described.keys(), described.keys() - layers.keys()
    if missing or extra:
        raise ValueError(
            f"the state in {folder} is for another model or other targets: it lacks "
            f"{len(missing)} layers that are compressed here (such as {min(missing, default='-')})"
            f" and has {len(extra)} that are not (such as {min(extra, default='-')})"
        )


def _check_layers(
    layers: dict[str, CompressedLayer],
    described: dict[str, Any],
    folder: str | os.PathLike[str],
) -> None:
    for name, layer in layers.items():
        there = described[name]
        here = {
            "outputs": layer.outputs,
            "features": layer.features,
            "groups": layer.velora.groups,
            "size": layer.velora.size,
        }
        different = {k: (there.get(k), v) for k, v in here.items() if there.get(k) != v}
        _check_config(name, layer.velora.config, there, different, folder)


def _check_config(
    name: str,
    config: VeloraConfig,
    there: dict[str, Any],
    different: dict[str, tuple[Any, Any]],
    folder: str | os.PathLike[str],
) -> None:
    """Refuse a state of another configuration, or with other differences known already."""
    different = dict(different)
    saved, defaults = there["config"], VeloraConfig().to_dict()
    # An adapter has several widths, and shows no groups to compare.
    sizes = SIZES[:1] if "sites" in there else SIZES
    for key, value in config.to_dict().items():
        there_too = saved.get(key, defaults.get(key))  # a field that is newer than the state
        if key not in sizes and there_too != value:
            different[key] = (there_too, value)
    if different:
        listed = ", ".join(f"{k}: {_shown(a)} there, {b!r} here" for k, (a, b) in different.items())
        raise ValueError(f"the state in {folder} does not fit layer {name!r} ({listed})")


@torch.no_grad()
def _restore_layer(
    layer: CompressedLayer, described: dict[str, Any], tensors: dict[str, Tensor], name: str
) -> None:
    device, wide = layer.velora_vectors.device, layer.velora_vectors.dtype
    for key in TENSORS:
        value = tensors.get(f"{name}.{key}")
        value = None if value is None else value.to(device, wide)
        if key == "delta" and value is not None:
            value = as_sharded(value, layer.coef)
        layer._buffers[f"velora_{key}"] = value
    for key in layer.velora.counters():
        if key not in ("name", "groups", "size"):
            setattr(layer.velora, key, described[key])
    if f"{name}.base" in tensors:
        copy_whole_(layer.raw_weight, tensors[f"{name}.base"])
    coef = layer._parameters["coef"]
    if coef is not None:
        pending = tensors.get(f"{name}.coef")
        if pending is None:
            coef.zero_()
        else:
            copy_whole_(coef, pending)
    layer._unchecked = None
    layer.adopt_coef()
