"""A run that was interrupted and resumed is the run it would have been, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from velora_torch import VeloraConfig, compress, export_lora
from velora_torch.checkpoint import load_state, save_state
from velora_torch.layers.state import TENSORS
from velora_torch.model import compressed_layers

from .tiny_models import batches, net, step

BF16 = torch.bfloat16
CUT, END = 4, 9
CONFIG = VeloraConfig(num_groups=4)


def everything(model: nn.Module) -> dict[str, Any]:
    """All tensors and counters of a compressed model."""
    found: dict[str, Any] = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, layer in compressed_layers(model).items():
        for key in TENSORS:
            value = layer._buffers[f"velora_{key}"]
            found[f"{name}.velora_{key}"] = None if value is None else value.clone()
        found[f"{name}.counters"] = layer.velora.counters()
    return found


def assert_same(there: dict[str, Any], here: dict[str, Any]) -> None:
    assert there.keys() == here.keys()
    for key, value in there.items():
        if isinstance(value, Tensor):
            assert value.dtype == here[key].dtype, key
            assert torch.equal(value, here[key]), key
        else:
            assert value == here[key], key


def state_files(folder: Path) -> list[Path]:
    """The tensor file and the JSON file."""
    return sorted(folder.glob("velora_state*"))


def new_run(
    config: VeloraConfig, dtype: torch.dtype, make: type[torch.optim.Optimizer], **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = compress(net(dtype=dtype), config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model.train(), make(trainable, **({"lr": 0.02} | settings))


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state_first: bool = False
) -> None:
    if state_first:
        save_state(model, folder)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    if not state_first:
        save_state(model, folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    load_state(model, folder)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


ADAMW, SGD, RMS = torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop
RUNS: dict[str, tuple[VeloraConfig, torch.dtype, Any, dict[str, Any]]] = {
    "average": (CONFIG, torch.float32, ADAMW, {}),
    "bf16-stochastic": (CONFIG, BF16, ADAMW, {"lr": 1e-3}),
    "bf16-nearest": (VeloraConfig(num_groups=4, rounding="nearest"), BF16, ADAMW, {"lr": 1e-3}),
    "fp16-stochastic": (CONFIG, torch.float16, ADAMW, {"lr": 1e-3, "eps": 1e-4}),
    "redrawn": (
        VeloraConfig(
            num_groups=4, init="random", vectors="per_group", refresh_every=2, track_delta=False
        ),
        BF16,
        ADAMW,
        {},
    ),
    "redrawn-average": (VeloraConfig(num_groups=4, refresh_every=4), torch.float32, ADAMW, {}),
    "redrawn-rmsprop": (
        VeloraConfig(num_groups=4, init="random", refresh_every=3),
        torch.float32,
        RMS,
        {"lr": 1e-3, "momentum": 0.9},
    ),
    "running": (VeloraConfig(num_groups=4, init="running_average"), torch.float32, ADAMW, {}),
    "batch": (VeloraConfig(num_groups=4, init="batch_average"), BF16, SGD, {"momentum": 0.9}),
    "svd": (VeloraConfig(num_groups=3, init="svd", refresh_every=4), torch.float32, SGD, {}),
    "fold-every-3": (VeloraConfig(num_groups=4, fold_every=3), torch.float32, ADAMW, {}),
    "fold-every-3-bf16": (VeloraConfig(num_groups=4, fold_every=3), BF16, SGD, {"momentum": 0.9}),
    "pending": (VeloraConfig(num_groups=4, fold_every=None), torch.float32, ADAMW, {}),
    "pending-bf16": (VeloraConfig(num_groups=4, fold_every=None), BF16, ADAMW, {}),
    "dense": (VeloraConfig(num_groups=4, gradient="dense"), torch.float32, ADAMW, {}),
    "dense-redrawn": (
        VeloraConfig(num_groups=4, gradient="dense", init="random", refresh_every=2),
        BF16,
        ADAMW,
        {},
    ),
}


@pytest.mark.parametrize("state_first", [False, True], ids=["weights-first", "state-first"])
@pytest.mark.parametrize("run", RUNS)
def test_resumed_is_bitwise_uninterrupted(run: str, state_first: bool, tmp_path: Path) -> None:
    config, dtype, make, settings = RUNS[run]
    inputs = batches(END, dtype=dtype)
    model, optimizer = new_run(config, dtype, make, **settings)
    for number, x in enumerate(inputs):
        if number == CUT:
            save(tmp_path, model, optimizer, state_first)
            saved = everything(model)
        step(model, optimizer, x)

    again, optimizer_again = new_run(config, dtype, make, **settings)
    torch.manual_seed(99)
    load(tmp_path, again, optimizer_again)
    assert_same(saved, everything(again))
    for x in inputs[CUT:]:
        step(again, optimizer_again, x)
    assert_same(everything(model), everything(again))
    states = zip(optimizer.state.values(), optimizer_again.state.values(), strict=True)
    for there, here in states:
        assert_same(there, here)
    probe = batches(1, dtype=dtype)[0]
    assert torch.equal(model.eval()(probe), again.eval()(probe))


@pytest.mark.parametrize("fold_every", [1, None])
def test_a_run_that_is_saved_is_the_run_that_is_not(fold_every: int | None, tmp_path: Path) -> None:
    config = VeloraConfig(num_groups=4, fold_every=fold_every)
    ends = []
    for saves in (False, True):
        model, optimizer = new_run(config, BF16, ADAMW)
        for x in batches(5, dtype=BF16):
            step(model, optimizer, x)
            if saves:
                save(tmp_path, model, optimizer)
        ends.append(everything(model))
    assert_same(*ends)


def test_a_resumed_run_can_still_be_exported(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, optimizer = new_run(CONFIG, torch.float32, SGD)
    for x in batches(3):
        step(model, optimizer, x)
    save(tmp_path, model, optimizer)
    again, optimizer_again = new_run(CONFIG, torch.float32, SGD)
    load(tmp_path, again, optimizer_again)
    names = [export_lora(m, tmp_path / n) for m, n in ((model, "a"), (again, "b"))]
    first, second = (load_file(n / "adapter_model.safetensors") for n in names)
    assert_same(first, second)


def test_the_state_lies_next_to_plain_weights(tmp_path: Path) -> None:
    model, optimizer = new_run(CONFIG, torch.float32, SGD)
    step(model, optimizer, batches(1)[0])
    save(tmp_path, model, optimizer)
    assert list(load_file(tmp_path / "model.safetensors")) == sorted(net().state_dict())
    tensors, text_file = state_files(tmp_path)
    assert text_file.name == "velora_state.json"
    assert tensors.match("velora_state-*.safetensors")
    text = json.loads(text_file.read_text())
    assert text["tensors"] == tensors.name
    assert text["layers"]["first"]["steps"] == 1
    assert text["layers"]["first"]["config"]["num_groups"] == 4


def test_only_what_the_weights_lack_is_saved(tmp_path: Path) -> None:
    model, optimizer = new_run(CONFIG, torch.float32, SGD)
    step(model, optimizer, batches(1)[0])
    save_state(model, tmp_path)
    assert sorted(load_file(tensor_file(tmp_path))) == [
        f"{layer}.{tensor}" for layer in ("first", "second") for tensor in ("delta", "vectors")
    ]


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    model, optimizer = new_run(CONFIG, torch.float32, SGD)
    for x in batches(3):
        step(model, optimizer, x)
        save_state(model, tmp_path)
    save_state(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    again, _ = new_run(CONFIG, torch.float32, SGD)
    load_state(again, tmp_path)
    assert again.first.velora.steps == 3  # type: ignore[union-attr]


# ------------------------------------------------------------------ bad input


def saved_run(folder: Path, config: VeloraConfig = CONFIG) -> None:
    model, optimizer = new_run(config, torch.float32, SGD)
    step(model, optimizer, batches(1)[0])
    save_state(model, folder)


def json_file(folder: Path) -> Path:
    return folder / "velora_state.json"


def tensor_file(folder: Path) -> Path:
    (file,) = folder.glob("velora_state-*.safetensors")
    return file


def assert_refused(folder: Path, model: nn.Module, kind: type[Exception], message: str) -> None:
    before = everything(model)
    with pytest.raises(kind, match=message):
        load_state(model, folder)
    assert_same(before, everything(model))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def overwrite(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("which", "damage", "kind", "message"),
    [
        (
            json_file,
            Path.unlink,
            FileNotFoundError,
            r"velora_state.json is missing: .*earlier checkpoint",
        ),
        (
            tensor_file,
            Path.unlink,
            FileNotFoundError,
            r"velora_state-\w+.safetensors is missing: .*earl",
        ),
        (tensor_file, truncate, ValueError, "truncated or damaged: the checksum .*use an earlier"),
        (tensor_file, flip, ValueError, "truncated or damaged: the checksum .*use an earlier"),
        (tensor_file, empty, ValueError, "truncated or damaged: the checksum .*use an earlier"),
        (
            json_file,
            truncate,
            ValueError,
            r"velora_state.json is truncated or damaged \(JSONDecodeError",
        ),
        (
            json_file,
            empty,
            ValueError,
            r"velora_state.json is truncated or damaged \(JSONDecodeError",
        ),
        (json_file, replace('"steps": 1', '"steps": 3'), ValueError, "truncated or damaged: the c"),
        (json_file, replace('"layers"', '"lasers"'), ValueError, r"damaged \(KeyError\('layers'\)"),
        (json_file, replace("velora_state-", "velora_state/"), ValueError, "names the tensor file"),
        (json_file, replace("velora_state-", "../velora_state-"), ValueError, "names the tensor f"),
        (json_file, overwrite("[" * 100_000), ValueError, "damaged .RecursionError"),
        (json_file, overwrite("[]"), ValueError, "velora_state.json is truncated or damaged"),
        (json_file, overwrite("3"), ValueError, "velora_state.json is truncated or damaged"),
        (json_file, replace("state/1", "state/7"), ValueError, "has format 'velora-torch/state/7'"),
    ],
)
def test_damaged_files_are_refused(
    which: Callable[[Path], Path],
    damage: Callable[[Path], None],
    kind: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    saved_run(tmp_path)
    damage(which(tmp_path))
    model, _ = new_run(CONFIG, torch.float32, SGD)
    assert_refused(tmp_path, model, kind, message)


def test_a_folder_without_a_state(tmp_path: Path) -> None:
    model, _ = new_run(CONFIG, torch.float32, SGD)
    assert_refused(tmp_path, model, FileNotFoundError, "not a checkpoint of a compressed run")
    assert_refused(tmp_path / "no", model, FileNotFoundError, "not a checkpoint of a compressed")


def test_a_state_of_another_model(tmp_path: Path) -> None:
    saved_run(tmp_path)
    other = compress(nn.Sequential(nn.Linear(8, 8)), CONFIG)
    message = (
        r"for another model or other targets: it lacks 1 layers that are compressed here \(such "
        r"as 0\) and has 2 that are not \(such as first\)"
    )
    assert_refused(tmp_path, other, ValueError, message)


def test_a_state_of_a_wider_model(tmp_path: Path) -> None:
    saved_run(tmp_path)
    wider = compress(net(width=32), CONFIG)
    message = r"does not fit layer 'first' \(outputs: 32 there, 64 here, features: 16 there, 32 he"
    assert_refused(tmp_path, wider, ValueError, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 8}, r"does not fit layer 'first' \(groups: 4 there, 8 here, size: 4 there"),
        (
            {"targets": ["first"]},
            "for another model or other targets.* has 1 that are not .*second",
        ),
        ({"init": "svd"}, "init: 'average' there, 'svd' here"),
        ({"vectors": "per_group"}, "vectors: 'shared' there, 'per_group' here"),
        ({"gradient": "dense"}, "gradient: 'factored' there, 'dense' here"),
        ({"refresh_every": 5}, "refresh_every: None there, 5 here"),
        ({"fold_every": 2}, "fold_every: 1 there, 2 here"),
        ({"fold_every": None}, "fold_every: 1 there, None here"),
        ({"seed": 7}, "seed: 0 there, 7 here"),
        ({"scale": 2.0}, "scale: 1.0 there, 2.0 here"),
        ({"rounding": "nearest"}, "rounding: 'stochastic' there, 'nearest' here"),
        ({"track_delta": False}, "track_delta: True there, False here"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_state_of_another_configuration(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved_run(tmp_path)
    model, _ = new_run(VeloraConfig(**({"num_groups": 4} | settings)), torch.float32, SGD)
    assert_refused(tmp_path, model, ValueError, message)


def test_the_same_groups_said_in_another_way_are_the_same(tmp_path: Path) -> None:
    saved_run(tmp_path)
    config = VeloraConfig(targets=["first", "second"], num_groups={"default": 4})
    model, _ = new_run(config, torch.float32, SGD)
    load_state(model, tmp_path)
    assert model.first.velora.steps == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("function", [save_state, load_state])
def test_a_plain_model_has_no_state(function: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not compressed: call velora_torch.compress\(model\)"):
        function(net(), tmp_path / "state")
    assert not (tmp_path / "state").exists()
