"""The catalogue covers what it promises, and the library knows nothing of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .catalogue import CATALOGUE

KINDS = {
    *("decoder", "mixture of experts", "state space", "encoder", "encoder-decoder"),
    *("vision", "speech", "multimodal"),
}
ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "velora_torch"


def test_at_least_forty_architectures_of_every_kind_and_both_libraries() -> None:
    names = [architecture.name for architecture in CATALOGUE]
    assert len(names) == len(set(names)) >= 40
    assert {architecture.kind for architecture in CATALOGUE} == KINDS
    assert {architecture.library for architecture in CATALOGUE} == {"transformers", "timm"}


def test_batches_differ_and_come_back() -> None:
    for architecture in CATALOGUE:
        first, again, other = (architecture.batch(seed) for seed in (0, 0, 1))
        assert all(first[key].equal(again[key]) for key in first), architecture.name
        assert any(not first[key].equal(other[key]) for key in first), architecture.name


def test_the_layers_that_compress_know_no_architecture() -> None:
    """What compresses, chooses and explains; recipes and presets may name models."""
    code = [*SOURCES.glob("layers/*.py"), *SOURCES.glob("subtoken/*.py")]
    code += [SOURCES / name for name in ("model.py", "selection.py", "overview.py", "stepping.py")]
    names = {re.sub(r"^timm-", "", a.name) for a in CATALOGUE} - {"mpt", "phi"}
    for path in code:
        words = set(re.findall(r"[a-z0-9_]+", re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text())))
        assert not words & names, path.name


def test_the_table_of_the_readme_sums_up_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compatibility

    page = compatibility.PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^\| ([\w-]+) \| ([\w -]+) \| (\d+) of (\d+) \|", page, flags=re.MULTILINE)
    assert [line[:2] for line in lines] == [(a.name, a.kind) for a in CATALOGUE]
    rows = [
        compatibility.Row(architecture, int(compressed), int(layers), 1, 1, ())
        for architecture, (_, _, compressed, layers) in zip(CATALOGUE, lines, strict=True)
    ]
    readme = compatibility.README.read_text(encoding="utf-8")
    assert compatibility.with_table(readme, rows) == readme, f"run {compatibility.COMMAND}"
    for wrong in ("", compatibility.END + compatibility.BEGIN, 2 * readme):
        with pytest.raises(ValueError, match="once each and in this order"):
            compatibility.with_table(wrong, rows)
