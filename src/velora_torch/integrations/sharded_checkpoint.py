"""Checkpoints in shards: each process writes what it holds, and reads what it needs.

The format of the tensors is that of ``torch.distributed.checkpoint`` in safetensors files, which
hold where in the whole tensor each piece lies:

    shards/shard-00001-model-00001-of-00001.safetensors    a file of each process
    shards/optimizer.json                                  what the optimizer's state has besides

Any number of processes, one included, can read them.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from velora_torch.atomic import write_whole

FOLDER = "shards"
JSON_FILE = "optimizer.json"
FORMAT = "velora-torch/shards/1"
NOTE = {"velora": f"the optimizer's state is in {FOLDER}/"}
"""What ``optimizer.pt`` holds instead of the state."""
MODEL, OPTIMIZER = "model.", "optimizer."


def check_available() -> None:
    """See that this PyTorch writes shards as safetensors.

    Raises:
        ValueError: says what to do instead.
    """
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter as Writer

        known = "save_distributed" in inspect.signature(Writer).parameters
    except ImportError:
        known = False
    if not known:
        raise ValueError(
            f"train.shard_checkpoints: PyTorch {torch.__version__} does not write shards as "
            f"safetensors; install a newer one, or leave it out: checkpoints hold whole tensors"
        )


def has_shards(folder: str | Path) -> bool:
    """Whether a checkpoint is one in shards."""
    return (Path(folder) / FOLDER / JSON_FILE).is_file()


def save_shards(folder: str | Path, model: nn.Module, optimizer: Any, write: bool) -> None:
    """Write a model and its optimizer's state into a checkpoint; every rank must call it.

    Args:
        folder: the checkpoint's, on a disk that all ranks see.
        model: its weights are written with the names of its ``state_dict``, each once.
        optimizer: a ``torch.optim.Optimizer``, or what has its ``state_dict``.
        write: whether this rank writes what there is one of.

    Raises:
        OSError: a file can't be written.
    """
    import torch.distributed.checkpoint as dcp

    state = optimizer.state_dict()
    tensors = {f"{MODEL}{name}": value for name, value in _distinct(model).items()}
    others: dict[str, dict[str, Any]] = {}
    for number, key, value in _entries(state):
        if isinstance(value, Tensor):
            tensors[f"{OPTIMIZER}{number}.{key}"] = value
        else:
            others.setdefault(str(number), {})[key] = value
    target = Path(folder) / FOLDER
    writer = dcp.HuggingFaceStorageWriter(str(target), save_distributed=True)
    dcp.save(tensors, storage_writer=writer)
    if write:
        content = {
            "format": FORMAT,
            "param_groups": state["param_groups"],
            "others": others,
        }
        write_whole(target / JSON_FILE, json.dumps(content))


def load_model(folder: str | Path, model: nn.Module) -> None:
    """Give a model, which is not sharded yet, the weights of a checkpoint in shards.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    there, here = whole_weights(folder), _distinct(model)
    different = there.keys() ^ here.keys()
    different |= {name for name in there.keys() & here if there[name].shape != here[name].shape}
    if different:
        raise ValueError(
            f"{Path(folder) / FOLDER} is of another model: {len(different)} weights are missing "
            f"or have another shape there or here, such as {min(different)}"
        )
    model.load_state_dict(there, strict=False)  # of tied weights the names lack all but one


def whole_weights(folder: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint in shards, whole, by the names that the model gave them."""
    found = {
        name.removeprefix(MODEL): torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in _stored(folder).items()
        if name.startswith(MODEL)
    }
    _read(folder, {f"{MODEL}{name}": tensor for name, tensor in found.items()})
    return found


class ShardedState:
    """An optimizer whose state lies in the shards of a checkpoint, and not where it is asked for.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or what has its ``state_dict``.
        folder: the checkpoint's.
    """

    def __init__(self, optimizer: Any, folder: str | Path) -> None:
        self._optimizer, self._folder = optimizer, folder

    def state_dict(self) -> dict[str, Any]:
        """A note where the state is."""
        return dict(NOTE)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state from the shards; this rank reads its part alone.

        Raises:
            ValueError: the shards are damaged, or of another model.
        """
        path = Path(self._folder) / FOLDER / JSON_FILE
        try:
            content = json.loads(path.read_bytes())
            form, groups = content["format"], content["param_groups"]
            found = {int(number): dict(entries) for number, entries in content["others"].items()}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); use another checkpoint") from None
        if form != FORMAT:
            raise ValueError(f"{path} has format {form!r}; this version reads {FORMAT!r}")
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        if len(parameters) != sum(len(group["params"]) for group in groups):
            raise ValueError(f"{path} is of another model: it has another number of parameters")
        targets: dict[str, Tensor] = {}
        for name, one in _stored(self._folder).items():
            if name.startswith(OPTIMIZER):
                text, _, key = name.removeprefix(OPTIMIZER).partition(".")
                targets[name] = _empty(parameters[int(text)], one)
                found.setdefault(int(text), {})[key] = targets[name]
        _read(self._folder, targets)
        self._optimizer.load_state_dict({"state": found, "param_groups": groups})


def _entries(state: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    for number, entries in state["state"].items():
        for key, value in entries.items():
            if not isinstance(value, (Tensor, int, float, str, bool, type(None))):
                raise ValueError(
                    f"train.shard_checkpoints: the optimizer keeps a {type(value).__name__} as "
                    f"{key!r}, which is no tensor or number; leave it out: checkpoints hold whole "
                    f"tensors"
                )
            yield number, key, value


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """A model's state, of which tied weights are named once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def _reader(folder: str | Path) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(Path(folder) / FOLDER))


def _stored(folder: str | Path) -> dict[str, Any]:
    """What the shards hold: size and type of each tensor."""
    return dict(_reader(folder).read_metadata().state_dict_metadata)


def _empty(parameter: Tensor, stored: Any) -> Tensor:
    """Where a state is read to: sharded as its parameter is, if it has its shape."""
    dtype = stored.properties.dtype
    if stored.size == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(stored.size, dtype=dtype)


def _read(folder: str | Path, targets: dict[str, Tensor]) -> None:
    """Fill tensors from the shards; each rank reads for itself."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(targets, storage_reader=_reader(folder), no_dist=True)
