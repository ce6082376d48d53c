"""Recipes, data, models and checkpoints are read, never run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

import transformers

from tests.hostile.test_fuzz_command import velora
from tests.training import tiny
from velora_torch import remote_code
from velora_torch.pickles import check_pickles
from velora_torch.training.data import DataError, prepare
from velora_torch.training.recipe import Recipe, RecipeError, load_recipe
from velora_torch.training.run import Options, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# ------------------------------------------------------------------ pickles


@pytest.fixture(scope="module")
def finished(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    train = {"steps": 2, "save_every": 2}
    recipe = tiny.recipe_dict(model, rows, folder / "run", train=train, evaluate={"before": False})
    run(load_recipe(tiny.save_recipe(folder / "recipe.yaml", recipe)), Options(), lambda line: None)
    return folder / "run"


def test_what_the_trainer_wrote_is_taken(finished: Path) -> None:
    checkpoint = finished / "checkpoint-2"
    assert {"optimizer.pt", "rng_state.pth"} <= {path.name for path in checkpoint.iterdir()}
    check_pickles(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(
    finished: Path, tmp_path: Path, name: str, zipped: bool
) -> None:
    checkpoint, ran = tmp_path / "checkpoint-2", tmp_path / "ran"
    shutil.copytree(finished / "checkpoint-2", checkpoint)
    if zipped:
        torch.save({"state": Bomb(ran)}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Bomb(ran)))
    with pytest.raises(ValueError, match=rf"{name} is damaged, or holds more than tensors"):
        check_pickles(checkpoint)
    assert not ran.exists()
    if zipped:  # it would have run
        torch.load(checkpoint / name, weights_only=False)
        assert ran.exists()


def test_a_damaged_pickle_is_refused(finished: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(finished / "checkpoint-2", checkpoint)
    file = checkpoint / "optimizer.pt"
    for content in (b"", file.read_bytes()[:-100], b"x" * 1000):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            check_pickles(checkpoint)


def test_a_run_is_not_resumed_from_code(
    model: Path, rows: Path, finished: Path, tmp_path: Path
) -> None:
    output, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(finished, output)
    checkpoint = output / "checkpoint-2"
    torch.save({"state": Bomb(ran)}, checkpoint / "optimizer.pt")
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Bomb(ran)))
    written = tiny.recipe_dict(model, rows, output, train={"steps": 4})
    recipe = load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written))
    with pytest.raises(ValueError):
        run(recipe, Options(resume=True), lambda line: None)
    assert not ran.exists()
    assert not (output / "checkpoint-4").exists()


# ------------------------------------------------------------------ recipes, data, templates


@pytest.mark.parametrize(
    "template",
    [
        "{input.__class__}",
        "{input.__class__.__mro__[1]}",
        "{instruction[0]}",
        "{input!r}{0}",
        "{instruction:{input.__class__}}",
        "{instruction:>9999999999}",
    ],
)
def test_templates_reach_nothing_but_their_fields(template: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    tiny.save_recipe(path, {"data": {"train": "rows.jsonl", "template": template}})
    with pytest.raises(RecipeError, match=r"template"):
        load_recipe(path)


@pytest.mark.parametrize("key", ["trust_remote_code", "model.trust_remote_code", "train.trust"])
def test_no_recipe_trusts_a_model(key: str, tmp_path: Path) -> None:
    path = tiny.save_recipe(tmp_path / "recipe.yaml", {"data": {"train": "rows.jsonl"}})
    with pytest.raises(RecipeError):
        load_recipe(path, [f"{key}=true"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('ran') }}",
        "{% for m in messages %}{{ m.clear() }}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ],
)
@pytest.mark.parametrize("kind", ["chat", "instruction"])
def test_chat_templates_run_in_a_sandbox(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    chats = [
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}]}
    ]
    asked = [{"instruction": "one", "output": "yes"}]
    rows = tiny.save_rows(tmp_path / "rows.jsonl", (chats if kind == "chat" else asked) * 3)
    recipe = Recipe.model_validate({"data": {"train": str(rows), "template": "chat"}})
    with pytest.raises(DataError, match="chat template refuses it"):
        prepare(recipe, tokenizer)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------ models

CONFIGURATION = """
import os
os.makedirs({ran!r}, exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "{kind}"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a model folder with code of its own; says where the code leaves a trace."""

    def make(kind: str) -> tuple[Path, Path]:
        folder, ran = tmp_path / "own", tmp_path / "ran"
        shutil.copytree(model, folder)
        (folder / "own.py").write_text(CONFIGURATION.format(ran=str(ran), kind=kind))
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = kind
        config["auto_map"] = {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnModel",
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder, ran

    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.chdir(tmp_path)
    yield make
    remote_code.trust_remote_code(False)


def lines(rows: Path) -> dict[str, list[str]]:
    return {
        "train": ["train", "recipe.yaml", "model=own"],
        "dry run": ["train", "recipe.yaml", "model=own", "--dry-run"],
        "analyze": ["analyze", "recipe.yaml", "model=own"],
        "explain": ["explain", "own", "--seq", "8"],
        "plan": ["plan", "--model", "own", "--budget", "1GiB", "--seq", "8"],
    }


@pytest.mark.parametrize("command", ["train", "dry run", "analyze", "explain", "plan"])
def test_a_models_own_code_is_refused_without_the_flag(
    own_code: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    _, ran = own_code("velora-test-own")
    recipe = tiny.recipe_dict(Path("own"), rows, tmp_path / "run")
    tiny.save_recipe(tmp_path / "recipe.yaml", recipe)
    code, errors = velora(monkeypatch, lines(rows)[command])
    assert code == 2
    assert "--trust-remote-code" in errors
    assert "own.py" in errors
    assert not ran.exists()
    assert not (tmp_path / "run").exists()


def test_a_models_own_code_is_not_run_where_transformers_has_its_own(
    own_code: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ran = own_code("llama")
    train = {"steps": 1, "save_every": None}
    recipe = tiny.recipe_dict(Path("own"), rows, tmp_path / "run", train=train, dtype="float32")
    tiny.save_recipe(tmp_path / "recipe.yaml", recipe)
    code, errors = velora(monkeypatch, ["train", "recipe.yaml"])
    assert code == 0, errors
    assert not ran.exists()


def test_a_models_own_code_runs_with_the_flag(
    own_code: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ran = own_code("velora-test-own")
    train = {"steps": 1, "save_every": None, "save_final": False}
    recipe = tiny.recipe_dict(Path("own"), rows, tmp_path / "run", train=train, dtype="float32")
    recipe["evaluate"] = {"before": False, "after": False}
    tiny.save_recipe(tmp_path / "recipe.yaml", recipe)
    code, errors = velora(monkeypatch, ["train", "recipe.yaml", "--trust-remote-code"])
    assert code == 0, errors
    assert ran.exists()
    code, errors = velora(monkeypatch, ["train", "recipe.yaml", "--overwrite"])  # not for ever
    assert code == 2
    assert "--trust-remote-code" in errors


def test_a_tokenizers_own_code_is_refused_without_the_flag(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(model, folder)
    (folder / "words.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "words.Own"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    recipe = tiny.recipe_dict(folder, rows, tmp_path / "run")
    tiny.save_recipe(tmp_path / "recipe.yaml", recipe)
    monkeypatch.chdir(tmp_path)
    code, errors = velora(monkeypatch, ["train", "recipe.yaml"])
    assert code == 2
    assert "words.py" in errors
    assert "--trust-remote-code" in errors
    assert not (tmp_path / "ran").exists()
