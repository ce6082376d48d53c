"""The command's surface: what is promised, and that a mistake is a message."""

from __future__ import annotations

import functools

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
        "--strategy",
        "--tensor-parallel",
        "--trust-remote-code",
    },
    "export": {"run", "--to", "--lora", "--trust-remote-code"},
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
        "--trust-remote-code",
    },
    "plan": {
        "--model",
        "--budget",
        "--method",
        "--batch",
        "--seq",
        "--max-batch",
        "--max-seq",
        "--dtype",
        "--device",
        "--optimizer",
        "--gpus",
        "--strategy",
        "--top",
        "--json",
        "--trust-remote-code",
    },
    "bench": {
        "name",
        "--output",
        "--scale",
        "--tasks",
        "--cases",
        "--variants",
        "--rounds",
        "--seeds",
        "--jobs",
        "--limit",
        "--list",
        "--table-only",
        "--no-time",
    },
    "analyze": {
        "recipe",
        "overrides",
        "--steps",
        "--groups",
        "--tokens",
        "--output",
        "--trust-remote-code",
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


# ------------------------------------------------------------------ plan


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small model's configuration, and what is predicted of it for all plans."""
    pytest.importorskip("transformers")
    from tests import tiny_models
    from velora_torch.memory.planner.predictor import Predictor

    place = tmp_path_factory.mktemp("plan") / "model"
    config = tiny_models.llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(place)
    return str(place), functools.partial(Predictor, _passes={}, _steps={})


@pytest.fixture
def folder(small, monkeypatch):
    place, predictor = small
    monkeypatch.setattr("velora_torch.memory.planner.plan.Predictor", predictor)
    return place


def plan(monkeypatch, capsys, folder: str, *more: str) -> tuple[int, str, str]:
    size = ("--batch", "2", "--seq", "16", "--optimizer", "adamw_fused", "--top", "1")
    return run(monkeypatch, capsys, "plan", "--model", folder, *size, *more)


def test_a_plan_is_a_table_and_a_recipe(monkeypatch, capsys, folder, tmp_path):
    code, output, _ = plan(monkeypatch, capsys, folder, "--budget", "1GiB")
    assert code == 0
    assert "full, batch 2, 16 tokens, within 1.00 GiB" in output
    for column in ("peak", "weights", "gradients", "optimizer", "saved", "logits", "temporary"):
        assert column in output
    (tmp_path / "recipe.yaml").write_text(output[output.index("model: ") :])
    recipe = str(tmp_path / "recipe.yaml")
    code, output, _ = run(monkeypatch, capsys, "train", recipe, "data.train=trec", "--print-config")
    assert code == 0
    assert "batch_size: 2\n" in output


def test_a_plan_as_json_is_json_alone(monkeypatch, capsys, folder):
    import json

    code, output, errors = plan(monkeypatch, capsys, folder, "--budget", "1GiB", "--json")
    assert (code, errors) == (0, "")  # progress is for terminals
    (candidate,) = json.loads(output)
    assert candidate["peak_gib"] < 1
    assert candidate["step_cost"] < 1
    assert f"model: {folder}" in candidate["recipe"]


def test_a_plan_that_fits_nothing(monkeypatch, capsys, folder):
    code, output, errors = plan(monkeypatch, capsys, folder, "--budget", "70KiB", "--json")
    assert code == 1
    assert "Nothing fits. The smallest needs" in errors
    assert output == "[]\n"


def test_a_plan_of_several_gpus_is_of_one_rank(monkeypatch, capsys, folder):
    more = ("--budget", "1GiB", "--gpus", "2", "--strategy", "fsdp2")
    code, output, _ = plan(monkeypatch, capsys, folder, *more)
    assert code == 0
    assert "2 GPUs with fsdp2, batch 2 per rank, 16 tokens, within 1.00 GiB each" in output
    assert "All numbers are of one of 2 ranks" in output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--budget", "24"), "cannot read the memory budget '24'"),
        (("--budget", "1KiB"), "below the weights alone"),
        (("--budget", "1GiB", "--method", "lroa"), "did you mean 'lora'"),
        (("--budget", "1GiB", "--seq", "33"), "between 1 and 32"),
        (("--budget", "1GiB", "--gpus", "0"), "gpus must be a number of at least 1"),
        (("--budget", "1GiB", "--strategy", "fsdp2"), "give a larger number (--gpus 2)"),
    ],
    ids=["budget", "weights", "method", "length", "gpus", "strategy"],
)
def test_mistakes_in_plans(monkeypatch, capsys, folder, more, message):
    code, output, errors = plan(monkeypatch, capsys, folder, *more)
    assert code == 2
    assert message in errors
    assert output == ""
