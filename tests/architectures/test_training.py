"""Any model: training moves it, and it is saved, loaded and restored like a plain one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from velora_torch import restore
from velora_torch.checkpoint import load_state, save_state
from velora_torch.model import compressed_layers

from ..anatomy import anatomy, assert_same, weights
from ..closeness import assert_bitwise, assert_close
from .architecture import Architecture
from .catalogue import CATALOGUE
from .promises import (
    STEPS,
    compressed_model,
    plain_model,
    run,
    train_one_step,
    trained_model,
)

pytestmark = pytest.mark.parametrize("architecture", CATALOGUE, ids=str)


def save(model: nn.Module, folder: Path) -> None:
    """As users of either library save a model."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))


def load(architecture: Architecture, folder: Path) -> nn.Module:
    model = plain_model(architecture)
    if hasattr(model, "from_pretrained"):
        loaded: nn.Module = model.from_pretrained(folder)
        return loaded.eval()
    load_model(model, str(folder / "model.safetensors"))
    return model


def outputs(model: nn.Module, architecture: Architecture) -> list[torch.Tensor]:
    with torch.no_grad():
        return run(model, architecture.batch(STEPS))


def without_hook_numbers(model: nn.Module) -> dict[str, Any]:
    """Transformers hooks its models when they first run, and hooks are numbered."""
    return {
        name: (kind, names, {k: len(v) if k.endswith("hooks") else v for k, v in held.items()}, own)
        for name, (kind, names, held, own) in anatomy(model).items()
    }


def test_three_steps_move_every_compressed_weight(architecture: Architecture) -> None:
    start, end = plain_model(architecture).state_dict(), trained_model(architecture).state_dict()
    assert list(start) == list(end)
    for name in compressed_layers(trained_model(architecture)):
        assert not torch.equal(start[f"{name}.weight"], end[f"{name}.weight"]), name
        assert torch.isfinite(end[f"{name}.weight"]).all(), name


def test_restore_gives_a_plain_model(architecture: Architecture) -> None:
    trained = trained_model(architecture)
    model = restore(copy.deepcopy(trained))
    plain = plain_model(architecture)
    expected, actual = outputs(trained, architecture), outputs(model, architecture)
    outputs(plain, architecture)
    assert without_hook_numbers(model) == without_hook_numbers(plain)
    assert_same(weights(trained), weights(model))
    for there, here in zip(expected, actual, strict=True):
        assert_bitwise(here, there)


def test_a_checkpoint_is_plain_and_loads(architecture: Architecture, tmp_path: Path) -> None:
    trained = trained_model(architecture)
    save(trained, tmp_path)
    loaded = load(architecture, tmp_path)
    assert not compressed_layers(loaded)
    assert_same(weights(trained), weights(loaded))
    expected, actual = outputs(trained, architecture), outputs(loaded, architecture)
    for there, here in zip(expected, actual, strict=True):
        assert_close(here, there, 1e-5)  # products depend on where in memory a file's tensors lie


def test_a_resumed_model_goes_on_as_if_it_had_not_stopped(
    architecture: Architecture, tmp_path: Path
) -> None:
    there, here = copy.deepcopy(trained_model(architecture)), compressed_model(architecture)
    save_state(there, tmp_path)
    here.load_state_dict(there.state_dict())
    load_state(here, tmp_path)
    for model in (there, here):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        train_one_step(model, optimizer, architecture.batch(STEPS), STEPS)
    assert_same(weights(there), weights(here))
