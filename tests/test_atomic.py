"""Folders are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from velora_torch.atomic import install_folder, replace_folder


def test_an_interrupted_folder_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    target = tmp_path / "deep" / "m"
    with pytest.raises(KeyboardInterrupt):
        install_folder(target, interrupted)
    assert list(target.parent.iterdir()) == []


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        install_folder(tmp_path / "m", full)
    assert list(tmp_path.iterdir()) == []


def test_the_faster_of_two_wins(tmp_path: Path) -> None:
    target = tmp_path / "m"

    def slow(folder: Path) -> None:
        (folder / "content").write_text("slow")
        install_folder(target, lambda other: (other / "content").write_text("fast"))

    install_folder(target, slow)
    assert (target / "content").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def folders(tmp_path: Path) -> tuple[Path, Path]:
    work, target = tmp_path / "staging" / "m", tmp_path / "m"
    (work / "deep").mkdir(parents=True)
    (work / "deep" / "new").write_text("new")
    target.mkdir()
    (target / "old").write_text("old")
    return work, target


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files")
def test_a_folder_is_replaced_after_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, target = folders(tmp_path)
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(file: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        real_sync(file)

    def replace(source: Path, to: Path) -> None:
        events.append(f"{source.name} -> {to.name}")
        real_replace(source, to)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    replace_folder(work, target)
    assert [path.name for path in target.rglob("*")] == ["deep", "new"]
    assert (tmp_path / "staging" / "former-m" / "old").exists()
    moved = events.index("m -> m")
    assert {"m", "deep", "new"} <= set(events[:moved])
    assert events[moved + 1 :] == [tmp_path.name]  # the new name too


def test_a_replacement_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, target = folders(tmp_path)
    real = os.replace

    def replace(source: Path, to: Path) -> None:
        if source == work:
            raise OSError(28, "No space left on device")
        real(source, to)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        replace_folder(work, target)
    assert (target / "old").read_text() == "old"
