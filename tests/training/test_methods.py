"""Every method that a recipe can name, on texts, images and a language model."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import transformers

from tests.training import tiny, tiny_tasks
from velora_torch.training.assemble import assemble
from velora_torch.training.exporting import export_run
from velora_torch.training.methods import MethodError
from velora_torch.training.models import ModelError
from velora_torch.training.recipe import Recipe
from velora_torch.training.run import Options, run
from velora_torch.training.schema import PEFT_METHODS, Method

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    # AdaLoRA may take all ranks from a layer; PEFT takes that for a broken checkpoint.
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
]

METHODS = [name for name in get_args(Method) if name != "qlora"]
LORA = {"r": 4, "dropout": 0.0, "alpha": 8.0}
NO_COMPRESSION = ("linear-probe", "bitfit")
"""Methods without a trainable layer that takes the activation."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Model and data of each task."""
    root = tmp_path_factory.mktemp("tiny")
    return {
        "text-classification": (
            tiny_tasks.save_encoder(root / "encoder"),
            tiny_tasks.save_texts(root / "texts.jsonl"),
        ),
        "image-classification": (
            tiny_tasks.save_vit(root / "vit"),
            tiny_tasks.save_pictures(root / "pictures"),
        ),
        "language-modeling": (
            tiny.save_model(root / "llama", torch.float32),
            tiny.save_rows(root / "rows.jsonl"),
        ),
    }


def recipe_for(method, task, places, output, **sections):
    model, data = places[task]
    if task == "language-modeling":
        recipe = tiny.recipe_dict(model, data, output, **sections)
        recipe |= {"dtype": "float32"}
        recipe["train"]["steps"] = 12
        recipe["train"].pop("save_every")
    else:
        recipe = tiny_tasks.recipe_dict(task, model, data, output, **sections)
    recipe["method"] = method
    if method in PEFT_METHODS:
        recipe["lora"] = dict(LORA)
    if method == "ia3":
        recipe["lora"]["targets"] = r".*\.(v_proj|up_proj|value|dense|fc1)"
    if method in NO_COMPRESSION:
        recipe["velora"] = None
    return recipe


@pytest.mark.parametrize("task", ["text-classification", "image-classification"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_a_task_and_saves_a_plain_model(method, task, places, tmp_path):
    recipe = recipe_for(method, task, places, tmp_path / "run")
    results = run(Recipe.model_validate(recipe), Options(report=False), lambda line: None)
    losses = [point.loss for point in results.history]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert results.after.score is not None
    assert 0 < results.model.trainable_parameters <= results.model.parameters
    assert bool(results.model.compressed_layers) == (method not in NO_COMPRESSION)
    assert results.memory.total > 0
    assert_final_is_plain(method, task, tmp_path / "run" / "final")


def assert_final_is_plain(method, task, final):
    if method in PEFT_METHODS or method == "coefficients":
        assert (final / "adapter_model.safetensors").is_file()
        return
    loader = {
        "text-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
        "language-modeling": transformers.AutoModelForCausalLM,
    }[task]
    model, info = loader.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear-probe"])
def test_a_method_adapts_a_language_model(method, places, tmp_path):
    recipe = recipe_for(method, "language-modeling", places, tmp_path / "run")
    if method == "bitfit":  # LLaMA has no biases
        with pytest.raises(MethodError, match="bias"):
            run(Recipe.model_validate(recipe), Options(report=False), lambda line: None)
        return
    results = run(Recipe.model_validate(recipe), Options(report=False), lambda line: None)
    assert results.history[-1].loss < results.history[0].loss
    assert_final_is_plain(method, "language-modeling", tmp_path / "run" / "final")


@pytest.mark.parametrize("method", ["full", "ssf", "hydra", "lora", "coefficients"])
def test_resumed_is_bitwise_the_uninterrupted_run(method, places, tmp_path):
    task = "image-classification"
    train = {"steps": 6, "save_every": 3, "keep": 3}
    whole = recipe_for(method, task, places, tmp_path / "whole", train=train)
    parts = recipe_for(method, task, places, tmp_path / "parts", train=train)

    def go(recipe, **options):
        return run(Recipe.model_validate(recipe), Options(**options), lambda line: None)

    expected = go(whole)
    go(parts)
    for path in (tmp_path / "parts").glob("checkpoint-6*"):
        (path / "trainer_state.json").unlink()  # as if it had been interrupted while saving
    assert go(parts, resume=True).after == expected.after


@pytest.mark.parametrize("method", ["lora", "coefficients", "ssf"])
def test_a_run_is_exported(method, places, tmp_path):
    recipe = recipe_for(method, "language-modeling", places, tmp_path / "run")
    run(Recipe.model_validate(recipe), Options(), lambda line: None)
    export_run(tmp_path / "run", tmp_path / "out", lora=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_targets_that_match_nothing_are_named(places, tmp_path):
    recipe = recipe_for("lora", "text-classification", places, tmp_path / "run")
    recipe["lora"]["targets"] = ["q_prj"]
    with pytest.raises(MethodError, match=r"method: lora: .*q_prj"):
        run(Recipe.model_validate(recipe), Options(), lambda line: None)
    assert not (tmp_path / "run").exists()


def test_weight_decay_leaves_scales_alone(places, tmp_path):
    recipe = recipe_for("ssf", "image-classification", places, tmp_path / "run")
    recipe["train"]["weight_decay"] = 0.1
    assembled = assemble(Recipe.model_validate(recipe), lambda line: None)
    decayed, kept = assembled.make_optimizer().param_groups
    scales = [p for n, p in assembled.model.named_parameters() if n.endswith("ssf.weight")]
    assert scales
    assert decayed["weight_decay"] == 0.1
    assert not {id(p) for p in decayed["params"]} & {id(p) for p in scales}
    assert {id(p) for p in kept["params"]} >= {id(p) for p in scales}


@pytest.mark.parametrize("method", ["full", "lora", "ssf"])
def test_a_head_may_have_a_rate_of_its_own(method, places, tmp_path):
    recipe = recipe_for(method, "image-classification", places, tmp_path / "run")
    recipe["train"] |= {"head_learning_rate": 0.5, "weight_decay": 0.1}
    assembled = assemble(Recipe.model_validate(recipe), lambda line: None)
    groups = assembled.make_optimizer().param_groups
    head = {id(p) for n, p in assembled.model.named_parameters() if "classifier" in n}
    trained = {id(p) for p in assembled.model.parameters() if p.requires_grad}
    by_rate = {rate: set() for rate in (0.5, recipe["train"]["learning_rate"])}
    for group in groups:
        by_rate[group["lr"]] |= {id(p) for p in group["params"]}
    assert by_rate[0.5] == head & trained
    assert by_rate[recipe["train"]["learning_rate"]] == trained - head


@pytest.mark.parametrize("method", ["full", "lora"])
def test_coefficients_may_have_a_rate_of_their_own(method, places, tmp_path):
    recipe = recipe_for(method, "image-classification", places, tmp_path / "run")
    recipe["train"] |= {"coefficient_learning_rate": 0.5, "head_learning_rate": 0.25}
    assembled = assemble(Recipe.model_validate(recipe), lambda line: None)
    groups = assembled.make_optimizer().param_groups
    named = dict(assembled.model.named_parameters())
    coefficients = {id(p) for n, p in named.items() if n.endswith(".coef")}
    assert coefficients
    fast = {id(p) for group in groups if group["lr"] == 0.5 for p in group["params"]}
    assert fast == coefficients
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in named.values() if p.requires_grad)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_may_have_rates_of_their_own(method, places, tmp_path):
    recipe = recipe_for(method, "language-modeling", places, tmp_path / "run")
    pattern = r".*layers\.0\.(self_attn\.q_proj|mlp\.(up|down)_proj)"
    recipe["train"] |= {"learning_rates": {pattern: 0.5}, "weight_decay": 0.1}
    assembled = assemble(Recipe.model_validate(recipe), lambda line: None)
    groups = assembled.make_optimizer().param_groups
    named = {n: p for n, p in assembled.model.named_parameters() if p.requires_grad}
    own = {n for n in named if ".0." in n and any(f"{k}_proj" in n for k in ("q", "up", "down"))}
    assert own
    for rate, names in ((0.5, own), (recipe["train"]["learning_rate"], set(named) - own)):
        found = [id(p) for group in groups if group["lr"] == rate for p in group["params"]]
        assert sorted(found) == sorted(id(named[n]) for n in names)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"layer.(": 1e-3}, r"'layer\.\(' is no regular expression"),
        ({".*q_proj": 0}, "greater than 0"),
        ({".*no_such": 1e-3}, r"no layer whose full name matches '\.\*no_such' trains"),
    ],
)
def test_wrong_rates_of_layers_are_refused(rates, words, places, tmp_path):
    recipe = recipe_for("full", "language-modeling", places, tmp_path / "run")
    recipe["train"]["learning_rates"] = rates
    with pytest.raises(ValueError, match=words):
        assemble(Recipe.model_validate(recipe), lambda line: None)


def test_a_rate_for_coefficients_of_a_method_without_any_is_refused(places, tmp_path):
    recipe = recipe_for("ssf", "image-classification", places, tmp_path / "run")
    recipe["train"] |= {"coefficient_learning_rate": 0.5}
    with pytest.raises(ModelError, match="nothing that method: ssf trains has coefficients"):
        assemble(Recipe.model_validate(recipe), lambda line: None)


@pytest.mark.parametrize("velora", [None, {"gradient": "dense"}])
def test_a_rate_for_coefficients_that_are_not_there_is_refused(velora, places, tmp_path):
    recipe = recipe_for("full", "image-classification", places, tmp_path / "run")
    recipe["train"] |= {"coefficient_learning_rate": 0.5}
    with pytest.raises(ValueError, match="has no effect with"):
        Recipe.model_validate({**recipe, "velora": velora})


def test_a_checkpoint_does_not_say_how_the_optimizer_computes(places, tmp_path):
    """One of processes that split layers, or of before recipes took fused kernels by themselves."""
    recipe = recipe_for("full", "language-modeling", places, tmp_path / "run")
    optimizer = assemble(Recipe.model_validate(recipe), lambda line: None).make_optimizer()
    assert all(group["fused"] for group in optimizer.param_groups)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"fused": None, "foreach": False, "lr": 0.25}
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25
        assert (group["fused"], group["foreach"]) == (True, None)
    state["param_groups"].append(state["param_groups"][0])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)
