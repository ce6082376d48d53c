"""Command lines of any words: an exit code and a message, never a traceback, and no folder."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import huggingface_hub
import typer.main
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import cases
from tests.training import tiny
from velora_torch import cli
from velora_torch.analysis import run as analysis
from velora_torch.bench import command as bench
from velora_torch.bench.speed import command as speed
from velora_torch.memory.simulator import architecture
from velora_torch.training import budget
from velora_torch.training import run as training

LINES = [
    "train recipe.yaml --dry-run",
    "train recipe.yaml train.steps=2 velora.num_groups=4 --print-config",
    "train recipe.yaml --resume --overwrite",
    "train recipe.yaml train.output=run --overwrite --trust-remote-code",
    "export run --to exported --lora",
    "explain model --batch 2 --seq 16 --targets q_proj --groups 4 --dtype float32 --json",
    "explain llama-7b --sub-token-size 8 --chart memory.png",
    "plan --model model --budget 1GiB --method lora --batch 2 --seq 16 --optimizer adamw --top 1",
    "plan --model llama-7b --budget 24GiB --max-batch --max-seq --device cpu --json",
    "bench glue --scale local --tasks a,b --variants x --seeds 1 --jobs 1 --limit 1 --list",
    "bench speed --cases a --rounds 3 --output out --no-time",
    "bench vtab --table-only",
    "analyze recipe.yaml train.steps=9 --steps 0,2 --groups 4,8 --tokens 8 --output analysis",
]
WORDS = sorted({word for line in LINES for word in line.split()})
EXITS = {0, 1, 2, 130}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data and recipes; what takes long after all checks is refused."""
    folder = tmp_path_factory.mktemp("command")
    model = tiny.save_model(folder / "model")
    config = json.loads((model / "config.json").read_text())
    (folder / "bad.json").write_text(json.dumps({**config, "hidden_size": "x"}))
    recipe = tiny.recipe_dict(Path("model"), tiny.save_rows(folder / "rows.jsonl"), Path("new"))
    tiny.save_recipe(folder / "recipe.yaml", recipe)
    (folder / "run").mkdir()
    tiny.save_recipe(folder / "run/recipe.yaml", recipe)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("all checks are done")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(cli, "app", typer.main.get_command(cli.app))  # built once, not 2,000 times
        patch.delenv("VELORA_DEBUG", raising=False)
        patch.setattr(huggingface_hub.HfApi, "model_info", refuse)
        patch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
        patch.setattr(architecture, "_hub_config", refuse)
        patch.setattr(architecture, "_FromConfig", refuse)
        patch.setattr(training, "run", refuse)
        patch.setattr(analysis, "analyze", refuse)
        patch.setattr(budget, "preview", refuse)
        patch.setattr(bench, "check_grid", refuse)
        patch.setattr(bench, "_write_table", refuse)
        patch.setattr(speed, "speed", refuse)
        yield folder


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command line with words changed, left out, doubled or put in."""
    line = draw(st.sampled_from(LINES)).split()
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(line)))
        word = draw(
            st.one_of(
                st.sampled_from(WORDS),
                cases.texts,
                cases.numbers.map(lambda number: str(number) if abs(number) < 1e300 else "1e400"),
                st.tuples(st.sampled_from(WORDS), cases.texts).map("=".join),
            )
        ).replace("\0", "")  # which no command line can hold
        how = draw(st.integers(0, 3))
        if how == 0:
            line.insert(place, word)
        elif how == 1:
            line[place : place + 1] = []
        elif how == 2:
            line[place : place + 1] = [word]
        else:
            line[place:place] = line[place : place + 2]
    return line


def velora(monkeypatch: pytest.MonkeyPatch, line: list[str]) -> tuple[int, str]:
    """Exit code and what is shown as an error."""
    monkeypatch.setattr(sys, "argv", ["velora", *line])
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")
    errors = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with redirect_stdout(output), redirect_stderr(errors), cases.watchdog():
        try:
            cli.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
        errors.flush()
        shown = errors.buffer.getvalue().decode()  # type: ignore[attr-defined]
    return code, shown


@cases.fuzz
@given(line=lines())
def test_any_command_line_ends_with_a_message(place: Path, line: list[str]) -> None:
    before = cases.tree(place)
    with pytest.MonkeyPatch.context() as patch:
        code, errors = velora(patch, line)
    assert code in EXITS
    assert "Traceback" not in errors
    if code:
        assert errors.strip() or not line
    assert cases.tree(place) == before
