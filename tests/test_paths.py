"""Where things lie."""

from pathlib import Path

from velora_torch.paths import cache_folder


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("VELORA_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("VELORA_CACHE")
    assert cache_folder() == Path("/b/velora-torch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "velora-torch"
