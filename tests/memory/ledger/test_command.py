"""`velora explain`: a model by its configuration, tables, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
from torch import nn

from tests.tiny_models import llama
from velora_torch import cli
from velora_torch.memory import explain
from velora_torch.memory.ledger.chart import MOST_KINDS, _kinds, draw


@pytest.fixture
def model(tmp_path: Path) -> str:
    llama().config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["velora", "explain", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    output, errors = capsys.readouterr()
    return int(stopped.value.code or 0), output, errors


def test_tables(monkeypatch, capsys, model):
    code, output, _ = run(
        monkeypatch, capsys, model, "--seq", "8", "--targets", "v_proj", "--targets", "down_proj"
    )
    assert code == 0
    assert output.startswith("tiny, batch 1 x 8 tokens, bfloat16\n")
    assert "2 x v_proj: its input is also kept by q_proj (mm), k_proj (mm)" in output


def test_json(monkeypatch, capsys, model):
    options = ("--json", "--batch", "3", "--seq", "8", "--dtype", "float32", "--groups", "4")
    code, output, _ = run(monkeypatch, capsys, model, *options)
    assert code == 0
    found = json.loads(output)
    assert found["total_bytes"] == sum(row["bytes"] for row in found["rows"])
    assert found["what_if"]["total_bytes_before"] == found["total_bytes"]
    assert found["what_if"]["added_bytes"] == 14 * 3 * 8 * 4 * 4
    assert len(found["what_if"]["layers"]) == 14


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_chart(monkeypatch, capsys, model, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"chart.{suffix}"
    code, _, _ = run(monkeypatch, capsys, model, "--seq", "8", "--chart", str(file))
    assert code == 0
    content = file.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG")
    else:
        text = content.decode()
        for shown in ("LlamaRMSNorm", "plain, ", "VeLoRA, ", "tiny, batch 1 x 8 tokens, bfloat16"):
            assert f">{shown}" in text, "text is text"


def test_a_model_of_one_kind_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    what_if = explain(nn.Linear(8, 8), torch.ones(4, 8)).what_if(num_groups=2)
    assert draw(what_if, tmp_path / "one.svg", "a layer").is_file()


def test_small_kinds_are_summed_up():
    before = {f"kind{i}": 100 - i for i in range(MOST_KINDS + 3)}
    kinds = _kinds(before, {"kind0": 7})
    assert len(kinds) == MOST_KINDS + 1
    assert kinds[0] == ("kind0", (100, 7))
    assert kinds[-1] == ("3 other kinds", (91 + 90 + 89, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--targets", "v_prj"), "'v_prj' matches no layer; nearest: v_proj"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--seq", "33"), "seq must be between 1 and 32"),
        (("--groups", "4", "--sub-token-size", "8"), "num_groups"),
        (("--chart", "chart.gif"), "ending in .png or .svg"),
        (("--chart", "nowhere/chart.png"), "no folder nowhere"),
    ],
)
def test_mistakes(monkeypatch, capsys, model, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(monkeypatch, capsys, model, *options)
    assert code == 2
    assert message in errors
