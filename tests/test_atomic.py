"""Folders are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from velora_torch.atomic import install_folder


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
