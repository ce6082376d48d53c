"""Pickles that other libraries write into a checkpoint: looked through before any is loaded.

Ours are safetensors and JSON. The trainer's optimizer, schedule and random states are pickles,
which it loads by torch's restricted unpickler: that runs nothing, but fails halfway into a resumed
run, and with a traceback.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

SUFFIXES = (".pt", ".pth", ".bin")
NEVER_LOADED = ("training_args.bin",)
"""Written by transformers' trainer, and read by nothing here."""


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
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{path} is damaged, or holds more than tensors, such as code that would run when "
                f"it is loaded ({reason}); nothing of it was run. Use an earlier checkpoint"
            ) from None
