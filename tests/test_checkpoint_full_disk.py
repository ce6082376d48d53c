"""A disk that is full while a state is saved: the former state stays as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from velora_torch import compress
from velora_torch.checkpoint import load_state, save_state
from velora_torch.model import compressed_layers

from .test_checkpoint import CONFIG, SGD, everything, new_run
from .tiny_models import batches, net, step, train


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class _FullFile:
    """Writes half of what it is given, then the disk is full."""

    def __init__(self, path: Any, mode: str) -> None:
        self.file = open(path, mode)  # noqa: SIM115

    def __enter__(self) -> _FullFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        full()


def second_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """The first file is written, the disk is full at the second."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return full() if len(calls) == 2 else function(*args, **kwargs)

    return call


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("place", ["fsync", "replace", "write"])
def test_a_full_disk_keeps_the_former_state(
    place: str, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = new_run(CONFIG, torch.float32, SGD)
    step(model, optimizer, batches(1)[0])
    save_state(model, tmp_path)
    former = everything(model)
    files = sorted(tmp_path.iterdir())
    step(model, optimizer, batches(2)[1])
    with monkeypatch.context() as patch:
        if place == "write":
            plain = open if which == "second" else _FullFile
            calls: list[Any] = []

            def opened(path: Any, mode: str) -> Any:
                calls.append(path)
                return (_FullFile if len(calls) == 2 else plain)(path, mode)

            patch.setattr("velora_torch.atomic.open", opened, raising=False)
        else:
            plain = getattr(os, place)
            patch.setattr(os, place, full if which == "first" else second_call(plain))
        with pytest.raises(OSError, match="No space left"):
            save_state(model, tmp_path)
    assert sorted(tmp_path.iterdir()) == files
    again, _ = new_run(CONFIG, torch.float32, SGD)
    load_state(again, tmp_path)
    for name, layer in compressed_layers(again).items():
        assert torch.equal(layer.velora_vectors, former[f"{name}.velora_vectors"])
        assert layer.velora.counters() == former[f"{name}.counters"]
    save_state(model, tmp_path)  # the disk has space again
    load_state(again, tmp_path)
    assert again.first.velora.steps == 2  # type: ignore[union-attr]


def test_a_full_disk_at_the_first_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compress(net(), CONFIG)
    train(model, batches(1))
    monkeypatch.setattr(os, "replace", second_call(os.replace))
    with pytest.raises(OSError, match="No space left"):
        save_state(model, tmp_path)
    assert not list(tmp_path.iterdir())
