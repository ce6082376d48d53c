"""A checkpoint is whole, or what is wrong with it is known before it is loaded."""

from __future__ import annotations

import json
import shutil

import pytest

from velora_torch.training.manifest import MANIFEST, damage, write_manifest
from velora_torch.training.staging import STAGING, checkpoints, clear, discard, place, rotate


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "checkpoint-3"
    (made / "shards").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (made / "shards" / "one").write_bytes(b"1")
    (made / "empty").touch()
    write_manifest(made)
    return made


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_whole_is_whole(folder):
    assert damage(folder) is None
    (folder / "notes.txt").write_text("added later")
    assert damage(folder) is None


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: flip(f / "model.safetensors", 77), "model.safetensors is damaged"),
        (lambda f: (f / "shards/one").unlink(), "shards/one is missing"),
        (lambda f: shutil.rmtree(f / "shards"), "shards/one is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "has 1 bytes and had 2,560"),
        (lambda f: (f / "empty").write_bytes(b"x"), "empty has 1 bytes and had 0"),
        (lambda f: (f / MANIFEST).unlink(), "its writing was cut off"),
        (lambda f: (f / MANIFEST).write_bytes(b""), "is damaged"),
        (lambda f: (f / MANIFEST).write_bytes(b"[1]"), "is damaged"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_harm_is_named(folder, harm, message):
    harm(folder)
    assert message in damage(folder)


def test_no_byte_of_a_manifest_changes_unnoticed(folder):
    path = folder / MANIFEST
    data = path.read_bytes()
    meaning = json.loads(data)
    for place_of in range(len(data)):
        flip(path, place_of)
        try:
            same = json.loads(path.read_bytes()) == meaning  # a space for another
        except ValueError:
            same = False
        assert same or damage(folder) is not None, place_of
        path.write_bytes(data)


def test_a_manifest_cannot_name_what_is_elsewhere(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"1")
    (folder / "shards/one").unlink()
    (folder / "shards/one").symlink_to(tmp_path / "secret")
    assert "outside of it" in damage(folder)


def whole(output, step):
    path = output / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text(str(step))
    write_manifest(path)
    return path


@pytest.mark.parametrize(
    ("written", "keep", "left"),
    [(8, 2, [8, 6]), (8, 1, [8]), (6, 2, [6, 4]), (6, 1, [6]), (2, 3, [2])],
)
def test_rotation_keeps_what_was_written_and_what_came_before(tmp_path, written, keep, left):
    paths = {step: whole(tmp_path, step) for step in (2, 4, 6, 8)}
    (tmp_path / "checkpoint-best").mkdir()  # no number: not ours
    rotate(tmp_path, paths[written], keep)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in left]
    assert (tmp_path / "checkpoint-best").exists()
    assert not (tmp_path / STAGING).exists()


def test_a_removal_that_is_cut_off_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    path = whole(tmp_path, 2)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(path)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == []
    clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_about_to_be_replaced_comes_back(tmp_path):
    whole(tmp_path / STAGING, 4)
    place(tmp_path, "checkpoint-4")
    assert damage(tmp_path / "checkpoint-4") is None
    (tmp_path / STAGING).mkdir()
    (tmp_path / "checkpoint-4").rename(tmp_path / STAGING / "former-checkpoint-4")  # killed here
    clear(tmp_path)
    assert damage(tmp_path / "checkpoint-4") is None
