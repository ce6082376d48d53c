"""Damaged and forged `velora_state` files: refused in words, and the model stays what it was."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import nn

from tests.hostile import cases
from tests.test_checkpoint import assert_same, everything, json_file, tensor_file
from tests.tiny_models import batches, net, step
from velora_torch import VeloraConfig, compress
from velora_torch.checkpoint import _checksum, load_state, save_state

CONFIG = VeloraConfig(num_groups=4, init="running_average", refresh_every=2)


class Saved:
    """A state as it was saved, and a model that takes it."""

    def __init__(self, folder: Path) -> None:
        self.original, self.folder = folder / "original", folder / "changed"
        model = compress(net(), CONFIG)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for x in batches(3):
            step(model.train(), optimizer, x)
        save_state(model, self.original)
        self.text: dict[str, Any] = json.loads(json_file(self.original).read_text())
        self.tensors = load_file(tensor_file(self.original))
        self.reset()

    def reset(self) -> None:
        """The model before it takes a state."""
        self.model: nn.Module = compress(net(), CONFIG)
        self.before = everything(self.model)

    def copy(self) -> None:
        """The folder as it was saved."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.original, self.folder)

    def check(self) -> None:
        """The state is taken, or refused and then nothing has changed."""
        refusal = ""
        with cases.watchdog():
            try:
                load_state(self.model, self.folder)
            except (ValueError, OSError) as error:
                refusal = str(error)
        if refusal:
            assert str(self.folder) in refusal or "the state of" in refusal
            assert_same(self.before, everything(self.model))
        else:
            still = torch.optim.SGD(self.model.parameters(), lr=0.0)
            step(self.model.train(), still, batches(1)[0])
            self.reset()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("state"))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All keys of nested objects."""
    for key, below in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(below, (*path, key))


@st.composite
def forged(draw: st.DrawFn, saved: Saved) -> None:
    """Other values in the JSON file, other tensors, and a checksum that fits them."""
    text, tensors = copy.deepcopy(saved.text), dict(saved.tensors)
    for _ in range(draw(st.integers(1, 2))):
        *above, key = draw(st.sampled_from(list(places(text))))
        section = text
        for name in above:
            section = section[name]
        if not isinstance(section, dict) or key not in section:
            continue
        if draw(st.integers(0, 3)):
            section[key] = draw(cases.values)
        else:
            del section[key]
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(list(tensors)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        kind = draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]))
        tensors[draw(st.sampled_from([name, f"{name}x", "first.coef", "first.base"]))] = torch.ones(
            shape, dtype=kind
        )
        if draw(st.booleans()):
            del tensors[name]
    data = save(tensors)
    if draw(st.integers(0, 3)) == 0:
        data = draw(cases.damaged(data))
    if "sha256" in text and draw(st.integers(0, 9)):
        text["sha256"] = _checksum(text.get("layers"), data)  # type: ignore[arg-type]
    tensor_file(saved.folder).write_bytes(data)
    json_file(saved.folder).write_text(json.dumps(text), encoding="utf-8")


@cases.fuzz
@given(data=st.data())
def test_a_damaged_state_changes_nothing(saved: Saved, data: st.DataObject) -> None:
    saved.copy()
    if data.draw(st.booleans()):
        data.draw(forged(saved))
    else:
        find = data.draw(st.sampled_from([json_file, tensor_file]))
        file = find(saved.folder)
        file.write_bytes(data.draw(cases.damaged(file.read_bytes())))
    saved.check()


def test_a_whole_state_is_taken(saved: Saved) -> None:
    saved.copy()
    load_state(saved.model, saved.folder)
    assert saved.model.first.velora.steps == 3  # type: ignore[union-attr]
    saved.reset()
