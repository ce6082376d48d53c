"""C that is compiled when it is needed: kept, made again, done without."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest

from velora_torch.subtoken.kernels import library

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("VELORA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "answer.c"
    file.write_text("int answer(void) { return 42; }\n")
    return file


def load(source: Path):
    return library.load.__wrapped__(source)


def kept(source: Path) -> list[Path]:
    return sorted((source.parent / "cache" / "native").glob("answer-*.so"))


@needs_compiler
def test_a_library_is_made_once_and_kept(source: Path):
    assert load(source).answer() == 42
    (file,) = kept(source)
    made = file.stat().st_mtime_ns
    assert load(source).answer() == 42
    assert [f.stat().st_mtime_ns for f in kept(source)] == [made]
    assert file.parent.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_another_source_is_another_library(source: Path):
    load(source)
    source.write_text("int answer(void) { return 43; }\n")
    assert load(source).answer() == 43
    assert len(kept(source)) == 2


@needs_compiler
def test_a_damaged_library_is_made_again(source: Path):
    load(source)
    (file,) = kept(source)
    whole = file.read_bytes()
    os.replace(shutil.copy(source, source.with_suffix(".no")), file)
    assert load(source).answer() == 42
    assert file.read_bytes()[:4] == whole[:4]


@needs_compiler
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_can_write_is_not_loaded(source: Path, what: str):
    load(source)
    (file,) = kept(source)
    file.write_bytes(b"not ours")
    changed = file if what == "file" else file.parent
    changed.chmod(0o777)
    assert load(source).answer() == 42


@needs_compiler
def test_without_room_in_the_cache_it_is_made_for_this_process(source: Path):
    (source.parent / "cache").write_text("a file where the folder should be")
    assert load(source).answer() == 42


@needs_compiler
def test_a_compiler_without_openmp_makes_it_too(source: Path, monkeypatch):
    wrapper = source.parent / "plain-cc"
    wrapper.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    assert load(source).answer() == 42


def test_without_a_compiler_there_is_none_and_no_word(source: Path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(source) is None


@needs_compiler
def test_it_can_be_turned_off(source: Path, monkeypatch):
    monkeypatch.setenv("VELORA_NATIVE", "0")
    assert load(source) is None
    assert not kept(source)


@needs_compiler
def test_what_cannot_be_compiled_is_said_once_with_what_to_do(source: Path):
    source.write_text("int answer(void) { return }\n")
    with pytest.warns(UserWarning, match=r"cannot make a library.*VELORA_NATIVE=0"):
        assert load(source) is None


def test_a_compiler_that_fails_is_said(source: Path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.warns(UserWarning, match="false cannot make a library"):
        assert load(source) is None
