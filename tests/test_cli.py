"""The command's surface: what is promised, and that a mistake is a message."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")

import typer.main

from velora_torch import cli

PROMISED = {
    "train": {
        "recipe",
        "overrides",
        "--resume",
        "--overwrite",
        "--print-config",
        "--dry-run",
    },
    "export": {"run", "--to", "--lora"},
    "explain": {
        "model",
        "--batch",
        "--seq",
        "--targets",
        "--groups",
        "--sub-token-size",
        "--dtype",
        "--json",
        "--chart",
    },
}


def surface() -> dict[str, set[str]]:
    group = typer.main.get_command(cli.app)
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        names: set[str] = set()
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            names |= {*parameter.opts, *parameter.secondary_opts} if is_option else {parameter.name}
        found[name] = names - {"--help"}
    return found


def test_commands_and_options_are_those_promised():
    assert surface() == PROMISED


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["velora", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    output, errors = capsys.readouterr()
    return int(stopped.value.code or 0), output, errors


@pytest.mark.parametrize("arguments", [(), ("train", "--help"), ("export", "--help")])
def test_help(monkeypatch, capsys, arguments):
    _, output, errors = run(monkeypatch, capsys, *arguments)
    assert "Usage" in output + errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "missing.yaml"), "missing.yaml: no such file"),
        (("train",), "Missing argument"),
        (("trian", "x"), "No such command"),
        (("export", "nowhere", "--to", "out"), "not the folder of a run"),
    ],
)
def test_mistakes_are_messages(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_print_config_is_a_recipe(monkeypatch, capsys, tmp_path):
    (tmp_path / "small.yaml").write_text("data: {train: trec}\n")
    code, output, _ = run(
        monkeypatch,
        capsys,
        "train",
        str(tmp_path / "small.yaml"),
        "train.steps=7",
        "--print-config",
    )
    assert code == 0
    (tmp_path / "whole.yaml").write_text(output)
    _, again, _ = run(monkeypatch, capsys, "train", str(tmp_path / "whole.yaml"), "--print-config")
    assert "steps: 7" in output
    assert again == output
