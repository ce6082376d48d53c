"""Pickles that other libraries write into a checkpoint: looked through before any is loaded.

Ours are safetensors and JSON. The trainer's optimizer, schedule and random states are pickles,
which it loads by torch's restricted unpickler: that runs nothing, but fails halfway into a resumed
run, and with a traceback.

GaLore's and APOLLO's optimizers keep an object for each matrix besides tensors; these classes hold
numbers and tensors alone, and are allowed.
"""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SUFFIXES = (".pt", ".pth", ".bin")
NEVER_LOADED = ("training_args.bin",)
"""Written by transformers' trainer, and read by nothing here."""
PROJECTORS = (
    "galore_torch.galore_projector.GaLoreProjector",
    "apollo_torch.random_projector.GradientProjector",
    "apollo_torch.svd_projector.GaLoreProjector",
)
"""Classes in the states of GaLore's and APOLLO's optimizers."""
_FAILURES = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError)


def check_pickles(folder: Path) -> None:
    """Refuse a checkpoint with a pickle that holds more than tensors and plain values.

    Raises:
        ValueError: names the file; it was tampered with, or is damaged.
    """
    from transformers.trainer_pt_utils import safe_globals

    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or path.name in NEVER_LOADED or not path.is_file():
            continue
        try:
            with safe_globals(), projectors_allowed(path):
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except _FAILURES as error:
            raise ValueError(
                f"{path} is damaged, or holds more than tensors, such as code that would run when "
                f"it is loaded ({_reason(error)}); nothing of it was run. Use an earlier checkpoint"
            ) from None


@contextmanager
def projectors_allowed(path: Path) -> Iterator[None]:
    """Let torch's restricted unpickler make those of `PROJECTORS` that a file names."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (*_FAILURES, OSError):
        names = []  # whoever loads it says what is wrong
    classes = [_class(name) for name in names if name in PROJECTORS]
    with torch.serialization.safe_globals([kind for kind in classes if kind is not None]):
        yield


def projectors_to_devices(optimizer: Any) -> None:
    """Move what projectors hold to the devices of their matrices: torch moves tensors alone.

    What stands for an optimizer whose state is sharded has no `state`, and no projectors.
    """
    for p, state in getattr(optimizer, "state", {}).items():
        projector = state.get("projector")
        if f"{type(projector).__module__}.{type(projector).__qualname__}" in PROJECTORS:
            for name, value in vars(projector).items():
                setattr(projector, name, _moved(value, p.device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list):  # of GaLore's, where it projects both sides
        return [_moved(each, device) for each in value]
    return value


def _class(name: str) -> Any:
    """The class of that name; None where its package is not installed."""
    module, _, own = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), own)
    except ImportError:
        return None


def _reason(error: Exception) -> str:
    """What torch found, without its advice to load the file all the same."""
    text = str(error).strip()
    unsupported = re.search(r"Unsupported \w+: [^\n]*?(?= was not|\n|$)", text)
    return unsupported[0] if unsupported else text.partition("\n")[0]
