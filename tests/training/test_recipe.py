"""Recipes: what loads, what is refused, and what the refusal says."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from velora_torch import VeloraConfig
from velora_torch.config import RECOMMENDED
from velora_torch.training.recipe import (
    Recipe,
    RecipeError,
    VeloraSection,
    load_recipe,
    recipe_to_yaml,
)
from velora_torch.training.schema import PEFT_METHODS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = """\
model: gpt2
velora:
  num_groups: 8
data:
  train: trec
train:
  epochs: 2
  learning_rate: 1e-4
"""


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "small.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def refusal(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


def test_values_defaults_and_derived_settings(write):
    recipe = load_recipe(write(SMALL))
    assert recipe.train.learning_rate == 1e-4  # a number, though YAML 1.1 calls it a text
    assert recipe.train.output == "runs/small"
    assert recipe.velora is not None
    assert recipe.velora.to_kwargs() == {"num_groups": 8}
    assert recipe.lora is None
    assert load_recipe(write("data: {train: trec}\n")).train.epochs == 1.0


def test_velora_is_on_by_default_and_null_turns_it_off(write):
    assert load_recipe(write("data: {train: trec}\n")).velora == VeloraSection()
    assert load_recipe(write(SMALL), ["velora=null"]).velora is None


def test_adapters_have_the_settings_that_compress_takes_by_itself(write):
    text = "method: {}\ndata: {{train: trec}}\n"
    for method in PEFT_METHODS:
        velora = load_recipe(write(text.format(method))).velora
        assert VeloraConfig(**velora.to_kwargs()) == VeloraConfig.recommended("lora")
        given = load_recipe(write(text.format(method)), ["velora={}"]).velora
        assert given == VeloraSection()
    planned = load_recipe(write(text.format("lora")), ["memory_budget=8GiB"])
    assert "velora" not in planned.model_fields_set  # which the budget chooses
    assert load_recipe(write(text.format("linear-probe"))).velora is None


def test_the_velora_section_mirrors_the_config():
    ours = {name: info.default for name, info in VeloraSection.model_fields.items()}
    del ours["recommended"]  # stands for others
    theirs = {f.name: f.default for f in fields(VeloraConfig)}
    assert ours == theirs
    VeloraConfig(**VeloraSection(num_groups={"v_proj": 4}, fold_every=None).to_kwargs())


@pytest.mark.parametrize("purpose", list(RECOMMENDED))
def test_recommended_settings_take_the_place_of_defaults(write, tmp_path, purpose):
    plain = write(SMALL.replace("num_groups: 8", f"recommended: {purpose}"))
    config = VeloraConfig(**load_recipe(plain).velora.to_kwargs())
    assert config == VeloraConfig.recommended(purpose)
    changed = load_recipe(plain, ["velora.num_groups=5", "velora.init=svd"])
    expected = VeloraConfig.recommended(purpose, num_groups=5, init="svd")
    assert VeloraConfig(**changed.velora.to_kwargs()) == expected
    again = tmp_path / "again.yaml"  # as a run writes it
    again.write_text(recipe_to_yaml(changed))
    assert VeloraConfig(**load_recipe(again).velora.to_kwargs()) == expected


def test_methods_bring_their_sections(write):
    recipe = load_recipe(write(SMALL), ["method=qlora"])
    assert recipe.lora is not None
    assert recipe.lora.r == 16
    assert recipe.quantization is not None
    assert recipe.quantization.type == "nf4"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.batch_size=4", ("train", "batch_size"), 4),
        ("train.learning_rate=3e-3", ("train", "learning_rate"), 3e-3),
        ("train.warmup=0.1", ("train", "warmup"), 0.1),
        ("train.warmup=20", ("train", "warmup"), 20),
        ("velora.targets=[q_proj, v_proj]", ("velora", "targets"), ["q_proj", "v_proj"]),
        ("velora.fold_every=null", ("velora", "fold_every"), None),
        ("compare.repeats=2", ("compare", "repeats"), 2),
        ('data.template="{input} ="', ("data", "template"), "{input} ="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overrides(write, override, key, value):
    section, name = key
    assert getattr(getattr(load_recipe(write(SMALL), [override]), section), name) == value


def test_an_override_replaces_the_setting_that_excludes_it(write):
    train = load_recipe(write(SMALL), ["train.steps=5"]).train
    assert (train.steps, train.epochs) == (5, None)
    velora = load_recipe(write(SMALL), ["velora.sub_token_size=8"]).velora
    assert velora is not None
    assert (velora.sub_token_size, velora.num_groups) == (8, None)
    assert "not both" in refusal(write(SMALL), "train.steps=5", "train.epochs=1")


@pytest.mark.parametrize("overrides", [[], ["method=qlora", "train.steps=7", "velora=null"]])
def test_a_printed_recipe_loads_as_the_same_recipe(write, overrides):
    recipe = load_recipe(write(SMALL), overrides)
    assert load_recipe(write(recipe_to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("epochs", "epoch", 7, "`train.epoch` is not a known key; did you mean `train.epochs`?"),
        ("epochs: 2", "lr: 2", 7, "did you mean `train.learning_rate`?"),
        ("model: gpt2", "learning_rate: 1", 1, "did you mean `train.learning_rate`?"),
        ("model: gpt2", "modle: gpt2", 1, "did you mean `model`?"),
        ("model: gpt2", "method: lorra", 1, "did you mean 'lora'?"),
        ("epochs: 2", "batch_size: -3", 7, "is -3; expected a number greater than or equal to 1"),
        ("epochs: 2", 'batch_size: "8"', 7, "is '8'; expected an integer"),
        ("epochs: 2", "batch_size: yes", 7, "is true; expected an integer"),
        ("epochs: 2", "eps: .nan", 7, "`train.eps` is nan"),
        ("num_groups: 8", "num_groups: {v_proj: 0}", 3, "`velora.num_groups.v_proj` is 0"),
        ("num_groups: 8", "num_groups: many", 3, "expected an integer or a section"),
        ("num_groups: 8", "init: SVD", 3, "expected 'average', 'running_average'"),
        ("num_groups: 8", "targets: '['", 3, "is not a regular expression"),
        ("train: trec", "train: trec\n  template: '{instructon}'", 6, "placeholder {instructon}"),
        ("train: trec", "train: trec\n  template: alpacca", 6, "did you mean 'alpaca'?"),
        ("train: trec", "train: trec\n  template: 'a {'", 6, "stray brace"),
        ("epochs: 2", "epochs: 2\n  steps: 5", 8, "set train.epochs or train.steps, not both"),
        ("num_groups: 8", "num_groups: 8\n  sub_token_size: 8", 4, "not both"),
        ("model: gpt2", "lora: {r: 8}", 1, "has no effect with method: full"),
        ("model: gpt2", "quantization: {}", 1, "set method: qlora"),
        ("epochs: 2", "epochs: 2\n  epochs: 3", 8, "is set twice (first on line 7)"),
        ("  epochs: 2", "\tepochs: 2", 7, "a tab character"),
        ("train: trec", "train: [trec", 6, "not valid YAML"),
        ("model: gpt2", "model: !!python/object/apply:os.getcwd []", 1, "not valid YAML"),
        ("model: gpt2", "1: gpt2", 1, "must be a word"),
        ("  train: trec\n", "  eval: trec\n", 4, "`data.train` is missing"),
    ],
    ids=lambda value: value.split("\n")[-1].strip() if isinstance(value, str) else "",
)
def test_refusals_name_line_key_and_remedy(write, old, new, line, says):
    path = write(SMALL.replace(old, new, 1))
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert says in message
    assert len(message.splitlines()) == 1


def test_all_problems_are_reported_at_once(write):
    text = SMALL.replace("gpt2", "3").replace("epochs: 2", "epochs: -2").replace("8", "0")
    assert len(refusal(write(text)).splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("train.stps=3", "did you mean `train.steps`?"),
        ("train.steps=0", "`train.steps` is 0; expected"),
        ("model.name=x", "`model` is not a section"),
        ("train.steps=[", "the value is not valid YAML"),
        ("lora.r=8", "has no effect with method: full"),
        ("data=null", "expected a section"),
    ],
)
def test_refused_overrides_are_named(write, override, says):
    message = refusal(write(SMALL), override)
    assert message.startswith(f"override `{override}`: ")
    assert says in message


def test_files_that_are_no_recipes(write, tmp_path):
    assert "the recipe is empty" in refusal(write("# nothing\n"))
    assert "expected `key: value` lines" in refusal(write("- trec\n"))
    write(SMALL)
    assert f"did you mean {tmp_path / 'small.yaml'}?" in refusal(tmp_path / "smal.yaml")
    assert "is a folder" in refusal(tmp_path)
    broken = tmp_path / "latin.yaml"
    broken.write_bytes(b"model: gpt2\ndata: {train: caf\xe9.csv}\n")
    assert f"{broken}:2: is not UTF-8 text" in refusal(broken)


def test_a_recursive_recipe_is_refused(write):
    assert "not valid YAML" in refusal(write("data: &x {train: *x}\n"))


def test_describe(write):
    text = load_recipe(write(SMALL), ["method=lora", "train.steps=20"]).describe()
    assert "gpt2, bfloat16 weights" in text
    assert "LoRA, rank 16" in text
    assert "num_groups=8" in text
    assert "20 steps of 8 sequences" in text
    assert "off: plain training" in load_recipe(write(SMALL), ["velora=null"]).describe()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_open_with_their_command(path):
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    assert recipe.velora is not None
    VeloraConfig(**recipe.velora.to_kwargs())
    assert recipe.model in recipe.describe()
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# velora train recipes/{path.name}")


def test_reading_a_recipe_imports_no_transformers():
    code = "import sys, velora_torch.training.recipe; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
