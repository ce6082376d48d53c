"""Classification and regression, of texts and of images, from a recipe to results.json."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.training import tiny_tasks as tiny
from velora_torch.report.results import read_results
from velora_torch.training.data import DataError, check_sources, prepare
from velora_torch.training.recipe import Recipe
from velora_torch.training.run import Options, run
from velora_torch.training.scoring import classification_scores, regression_scores

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny.save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.save_pictures(tmp_path_factory.mktemp("pictures"))


def go(recipe, lines=None):
    say = (lambda line: None) if lines is None else lines.append
    return run(Recipe.model_validate(recipe), Options(), say)


@pytest.mark.parametrize("pairs", [False, True], ids=["one text", "pairs"])
@pytest.mark.parametrize("velora", [True, False], ids=["velora", "plain"])
def test_texts_are_classified(encoder, tmp_path, pairs, velora):
    data = tiny.save_texts(tmp_path / "rows.jsonl", pairs=pairs)
    recipe = tiny.recipe_dict("text-classification", encoder, data, tmp_path / "run")
    if not velora:
        recipe["velora"] = None
    results = go(recipe)
    assert results.after.score == results.after.accuracy > results.before.accuracy
    assert set(results.after.scores) == {"accuracy", "f1", "matthews"}
    assert results.after.choices == list(tiny.CLASSES)
    assert results.memory.total > 0
    assert read_results(tmp_path / "run" / "results.json").after == results.after
    final = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "final"
    )
    assert final.config.id2label == dict(enumerate(tiny.CLASSES))
    assert type(final.bert.encoder.layer[0].output.dense) is torch.nn.Linear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["no autocast", "autocast"])
def test_numbers_are_learnt(encoder, tmp_path, dtype, autocast):
    data = tiny.save_texts(tmp_path / "rows.jsonl", number=True)
    train = {"autocast": autocast}
    results = go(
        tiny.recipe_dict(
            "text-regression", encoder, data, tmp_path / "run", dtype=dtype, train=train
        )
    )
    assert results.after.metric == "pearson"
    assert results.after.score == results.after.scores["pearson"] > 0.5
    assert results.after.loss < results.before.loss


def test_images_are_classified(vit, pictures, tmp_path):
    lines = []
    recipe = tiny.recipe_dict(
        "image-classification",
        vit,
        pictures,
        tmp_path / "run",
        compare={"repeats": 1},
        train={"autocast": True, "steps": 40, "learning_rate": 3e-3},
    )
    results = go(recipe, lines)
    assert results.after.accuracy > 0.8
    assert results.after.scores["f1"] > 0.8
    assert any("images/s" in line for line in lines)
    plain, ours = results.compare
    assert ours.gradient_bytes < plain.gradient_bytes
    assert not any(name.startswith("classifier") for name in results.model.compressed_layers)


def test_a_folder_may_bring_its_own_split(vit, tmp_path):
    tiny.save_pictures(tmp_path / "data" / "train", count=4)
    tiny.save_pictures(tmp_path / "data" / "test", count=2)
    recipe = Recipe.model_validate(
        tiny.recipe_dict("image-classification", vit, tmp_path / "data", tmp_path / "run")
    )
    prepared = prepare(recipe, None)
    assert len(prepared.train) == 12
    assert len(prepared.eval) == 6
    batch = prepared.collator([prepared.train[0], prepared.train[1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    pixels = np.array(Image.open(tmp_path / "data" / "train" / "left" / "0.png").resize((16, 16)))
    assert batch["pixel_values"].min() >= -1
    assert batch["pixel_values"][0, :, :, 0].mean() > pixels.min() / 255


def test_text_regression_on_classes_is_refused(encoder, tmp_path):
    data = tiny.save_texts(tmp_path / "rows.jsonl")
    recipe = tiny.recipe_dict("text-regression", encoder, data, tmp_path / "run")
    with pytest.raises(DataError, match="must be a number, not '"):
        go(recipe)
    assert not (tmp_path / "run").exists()


def test_a_class_only_in_the_held_out_data_is_refused(encoder, tmp_path):
    data = tiny.save_texts(tmp_path / "rows.jsonl")
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"sentence": "one", "label": "up"}) + "\n", encoding="utf-8")
    recipe = tiny.recipe_dict("text-classification", encoder, data, tmp_path / "run")
    recipe["data"] = {"train": str(data), "eval": str(held), "max_length": 16}
    with pytest.raises(DataError, match=r"held.jsonl: example 0: the class 'up' is none of"):
        go(recipe)


def test_data_without_labels_are_refused(encoder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"sentence": "one two", "other": 1}\n' * 3, encoding="utf-8")
    recipe = tiny.recipe_dict("text-classification", encoder, data, tmp_path / "run")
    with pytest.raises(DataError, match="needs a column for label; there are: sentence, other"):
        go(recipe)


@pytest.mark.parametrize("policy", ["error", "skip", "truncate"])
def test_texts_that_are_too_long(encoder, tmp_path, policy):
    data = tiny.save_texts(tmp_path / "rows.jsonl")
    recipe = tiny.recipe_dict("text-classification", encoder, data, tmp_path / "run")
    fitting = sum(
        len(json.loads(line)["sentence"].split()) <= 3 for line in data.read_text().splitlines()
    )
    assert 0 < fitting < 48
    # 8 is the smallest length that a recipe may name
    recipe["data"] = {"train": str(data), "too_long": policy, "eval_fraction": 0.0}
    whole = Recipe.model_validate(recipe)
    whole.data.max_length = 3
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    if policy == "error":
        with pytest.raises(DataError, match=r"more than data\.max_length = 3"):
            prepare(whole, tokenizer)
        return
    prepared = prepare(whole, tokenizer)
    assert len(prepared.train) == (fitting if policy == "skip" else 48)
    assert max(len(row["input_ids"]) for row in prepared.train) == 3


@pytest.mark.parametrize("name", ["trec-50", "vader"])
def test_packaged_texts_know_their_task(encoder, tmp_path, name):
    other = "text-regression" if name == "trec-50" else "text-classification"
    recipe = Recipe.model_validate(tiny.recipe_dict(other, encoder, "x", tmp_path / "run"))
    recipe.data.train = name
    check_sources(recipe)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    with pytest.raises(DataError, match=f"{name} is for task: "):
        prepare(recipe, tokenizer)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task": "image-classification", "evaluate": {"metric": "choice"}}, "not a metric of"),
        ({"task": "text-classification", "data": {"train": "trec", "packing": True}}, "no meaning"),
        ({"task": "text-classification", "train": {"chunked_loss": True}}, "language models"),
        ({"task": "text-regression", "evaluate": {"perplexity": "pydoc"}}, "language models"),
        ({"task": "text-classification", "memory_budget": "1GiB"}, "cannot be planned for task"),
        ({"method": "ssf", "memory_budget": "1GiB"}, "cannot be planned for method: ssf"),
        ({"method": "ssf", "lora": {"r": 4}}, "has no effect with method: ssf"),
        ({"method": "lora", "hydra": {"r": 4}}, "has no effect with method: lora"),
        ({"method": "lora", "quantization": {}}, "has no effect with method: lora"),
        ({"method": "coefficients", "velora": None}, "holds the coefficients"),
        ({"method": "coefficients", "velora": {"fold_every": 1}}, "must be null"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_contradict_each_other(settings, says):
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate({"data": {"train": "trec"}} | settings)


def test_scores():
    truth = torch.tensor([0, 0, 1, 1])
    scores = classification_scores(torch.tensor([0, 1, 1, 1]), truth, 2)
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx(0.8)
    assert scores["matthews"] == pytest.approx(1 / 3**0.5)
    numbers = regression_scores(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert numbers["spearman"] == pytest.approx(1)
    assert numbers["pearson"] == pytest.approx(0.98198, abs=1e-4)
    constant = regression_scores(torch.ones(3), torch.arange(3.0))
    assert constant == {"pearson": None, "spearman": None}


@pytest.mark.parametrize(
    ("task", "train"), [("text-classification", "trec"), ("image-classification", "count")]
)
def test_settings_can_be_chosen_without_the_test_split(encoder, vit, tmp_path, task, train):
    """800 to train, 200 to choose by: all of them from the training split."""
    model = encoder if task.startswith("text") else vit
    recipe = tiny.recipe_dict(task, model, train, tmp_path / "run")
    data = {"train": train, "max_train": 80, "max_eval": 20, "max_length": 512}
    data |= {"too_long": "truncate", "eval_fraction": 0.2, "seed": 3}
    own = examples_of(recipe, {**data, "eval_split": "test"})
    chosen = examples_of(recipe, {**data, "eval_split": "train"})
    assert [len(part) for part in own] == [len(part) for part in chosen] == [80, 20]
    assert not set(chosen[0]) & set(chosen[1])
    assert not set(chosen[1]) & set(own[1])
    with pytest.raises(DataError, match="has the splits 'train' and 'test', not 'valid'"):
        examples_of(recipe, {**data, "eval_split": "valid"})


def examples_of(recipe, data):
    """Training and held-out examples, each as something that can be compared."""
    checked = Recipe.model_validate({**recipe, "data": data})
    prepared = prepare(checked, transformers.ByT5Tokenizer())  # tells all texts apart
    key = "input_ids" if checked.task.startswith("text") else "pixel_values"
    return [
        [str(list(map(int, torch.as_tensor(row[key]).flatten()))) for row in part]
        for part in (prepared.train, prepared.eval)
    ]
