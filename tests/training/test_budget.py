"""A memory budget: the run takes what fits, keeps what was given, and begins with the longest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import tiny
from tests.training.test_run import go, interrupt_at
from velora_torch.model import compressed_layers
from velora_torch.recomputation import recomputed
from velora_torch.report.results import read_results
from velora_torch.training import budget
from velora_torch.training.assemble import prepare_data
from velora_torch.training.folder import RunFolder
from velora_torch.training.order import LongestFirst
from velora_torch.training.recipe import RecipeError, load_recipe, recipe_to_yaml
from velora_torch.training.trainer import RecordingMixin

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

LONG = "task one two three one two three one two three one two three"
FIXED: dict[str, Any] = {"optimizer": "adamw_torch", "chunked_loss": False, "recompute": False}
"""Settings that are given, so that a plan has few cases to simulate."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    tasks = [f"task {a} {b}" for a in tiny.WORDS[:4] for b in tiny.WORDS[:4]]
    examples = [{"instruction": t, "output": "yes"} for t in (*tasks[:9], LONG, *tasks[9:])]
    return tiny.save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", examples)


@pytest.fixture
def recipe(model, rows, tmp_path):
    def make(output="run", *, given=("velora",), **sections):
        sections["evaluate"] = {"before": False, "after": False}
        written = tiny.recipe_dict(model, rows, tmp_path / output, **sections)
        if "velora" not in given:
            del written["velora"]
        return load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written))

    return make


def first_batches(monkeypatch):
    """Tokens of every micro-batch that is trained."""
    shapes: list[tuple[int, ...]] = []
    real = RecordingMixin.training_step

    def training_step(self, model, inputs, *rest):
        shapes.append(tuple(inputs["input_ids"].shape))
        return real(self, model, inputs, *rest)

    monkeypatch.setattr(RecordingMixin, "training_step", training_step)
    return shapes


# ------------------------------------------------------------------ order


@pytest.mark.parametrize("group", [None, 4], ids=["random", "grouped"])
def test_the_longest_leads_and_every_example_comes_once(group):
    lengths = [3, 9, 4, 12, 5, 5, 2, 7]
    order = LongestFirst(lengths, seed=1, group=group)
    epochs = []
    for epoch in range(3):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert epochs[-1][0] == 3
        assert sorted(epochs[-1]) == list(range(8))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = LongestFirst(lengths, seed=1, group=group)
    again.set_epoch(2)
    assert list(again) == epochs[2]
    assert list(LongestFirst(lengths, seed=2, group=group)) != epochs[0]
    assert list(LongestFirst([], seed=0)) == []


@pytest.mark.parametrize("train", [{}, {"group_by_length": True}], ids=["random", "grouped"])
def test_the_first_batch_of_a_run_is_the_largest(recipe, monkeypatch, train):
    shapes = first_batches(monkeypatch)
    go(recipe(train={"longest_first": True, "steps": 8, **train}))
    sizes = [batch * tokens for batch, tokens in shapes]
    assert shapes[0][0] == 4
    assert sizes[0] == max(sizes) > min(sizes)
    assert shapes[0][1] == max(tokens for _, tokens in shapes)


SETTINGS = {
    "1 block in 2": {"train": {"gradient_checkpointing": 2, "longest_first": True}},
    "everything again": {
        "train": {
            "gradient_checkpointing": True,
            "recompute": True,
            "chunked_loss": True,
            "group_by_length": True,
            "longest_first": True,
        }
    },
    "budget": {"memory_budget": "1GiB", "train": FIXED},
}


@pytest.mark.parametrize("sections", SETTINGS.values(), ids=SETTINGS.keys())
def test_interrupted_and_resumed_is_bitwise_the_uninterrupted_run(recipe, tmp_path, sections):
    go(recipe("whole", **sections))
    half = go(recipe("halves", **sections), interrupt_at(3))
    assert half.run.status == "interrupted"
    resumed = go(recipe("halves", **sections), resume=True)
    assert [point.step for point in resumed.history] == [1, 2, 3, 4, 5, 6]
    assert resumed.prediction == half.prediction
    whole, halves = (
        load_file(tmp_path / run / "final/model.safetensors") for run in ("whole", "halves")
    )
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


@pytest.mark.parametrize(
    "train",
    [{"recompute": True}, {"gradient_checkpointing": 2}],
    ids=lambda train: next(iter(train)),
)
def test_savings_save_and_change_nothing(recipe, train):
    plain = go(recipe("plain", velora=None, dtype="float32", train={"steps": 2}))
    saving = go(recipe("saving", velora=None, dtype="float32", train={"steps": 2, **train}))
    assert saving.memory.saved_activations < plain.memory.saved_activations
    losses = [[point.loss for point in run.history] for run in (plain, saving)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("train", "kinds"),
    [
        ({}, set()),
        ({"chunked_loss": True}, {"chunked loss"}),
        ({"recompute": True}, {"norm", "activation"}),
        ({"gradient_checkpointing": 2}, {"checkpoint"}),
    ],
    ids=["nothing", "loss", "norms and activations", "blocks"],
)
def test_a_recipe_applies_what_it_says_alone(recipe, train, kinds):
    from velora_torch.training import models

    asked = recipe(train=train)
    built = models.save_memory(asked, models.load_model(asked, lambda line: None))
    assert set(recomputed(built).values()) == kinds
    assert compressed_layers(built)


def test_checkpointing_some_blocks_trains_adapters(recipe):
    pytest.importorskip("peft")
    results = go(recipe(method="lora", train={"gradient_checkpointing": 2}))
    assert results.history[-1].loss < results.history[0].loss


def test_a_budget_is_that_of_one_of_the_processes(recipe, monkeypatch):
    """Under a launcher the plan is for as many, and for how they share the model."""
    made = recipe(given=(), memory_budget="1GiB", dtype="float32")
    tokenizer, data = prepare_data(made, lambda line: None)
    assert tokenizer is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    peaks = []
    for strategy in ("ddp", "fsdp2"):
        _, prediction = budget.fit(made, data, lambda line: None, strategy)
        peaks.append(prediction.peak["weights"])
    assert peaks[1] < 0.75 * peaks[0]


def test_more_blocks_than_there_are(recipe):
    with pytest.raises(ValueError, match=r"train\.gradient_checkpointing: every must be .* 1 to 2"):
        go(recipe(train={"gradient_checkpointing": 3}))


# ------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"memory_budget": "24"}, "cannot read the memory budget '24'"),
        ({"memory_budget": "24GiB", "train": {"autocast": True}}, "train.autocast"),
        ({"train": {"gradient_checkpointing": 0}}, "train.gradient_checkpointing"),
    ],
    ids=["no unit", "autocast", "every 0"],
)
def test_mistakes_in_recipes(recipe, sections, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**sections)


def test_a_comparison_needs_velora_to_be_given(recipe):
    with pytest.raises(RecipeError, match="which compare needs"):
        recipe(given=(), memory_budget="1GiB", compare={"repeats": 1})


def test_describe_names_savings_and_budget(recipe):
    text = recipe(
        memory_budget="1GiB", train={"gradient_checkpointing": 2, "recompute": True}
    ).describe()
    assert "gradient checkpointing of 1 block in 2, recomputed norms and activations" in text
    assert "at most 1GiB" in text
    assert "all-linear: " in text
    assert "velora      as planned" in recipe(given=(), memory_budget="1GiB").describe()


# ------------------------------------------------------------------ plans


def planned(recipe: Any, longest: int = 14) -> Any:
    data = SimpleNamespace(stats={"longest": longest})
    return budget.fit(recipe, data, lambda line: None)  # type: ignore[arg-type]


def test_what_is_given_is_kept_and_the_rest_is_chosen(recipe):
    roomy = recipe(memory_budget="1GiB", train={**FIXED, "gradient_checkpointing": 2})
    taken, prediction = planned(roomy)
    assert taken.velora == roomy.velora
    assert taken.train.gradient_checkpointing == 2
    assert taken.train.optimizer == "adamw_torch"
    assert taken.train.longest_first
    assert not roomy.train.longest_first
    assert "(M=4)" in prediction.setup
    assert 0 < prediction.peak_bytes < prediction.budget_bytes == 2**30
    assert sum(prediction.peak.values()) == prediction.peak_bytes
    assert load_dumped(taken) == taken


def load_dumped(recipe):
    import yaml

    return type(recipe).model_validate(yaml.safe_load(recipe_to_yaml(recipe)))


def test_a_tight_budget_chooses_savings(recipe):
    open_recipe = {**FIXED, "batch_size": 64}
    del open_recipe["recompute"]
    _, roomy = planned(recipe(memory_budget="1GiB", train=open_recipe), longest=32)
    tight, prediction = planned(
        recipe(memory_budget=roomy.peak_bytes - 512, train=open_recipe), longest=32
    )
    assert prediction.peak_bytes <= roomy.peak_bytes - 512
    assert tight.train.recompute or tight.train.gradient_checkpointing
    assert "recomputed" in prediction.setup or "checkpointing" in prediction.setup


def test_the_longest_sequence_is_padded_as_batches_are(recipe, monkeypatch):
    asked: list[tuple[int, int]] = []

    def plan(config, *, batch, seq, **rest):
        asked.append((batch, seq))
        raise ValueError("stop")

    monkeypatch.setattr(budget, "plan", plan)
    cases = [(14, {}), (16, {}), (30, {}), (14, {"packing": True}), (100, {})]
    for longest, data in cases:
        with pytest.raises(ValueError, match="stop"):
            planned(recipe(memory_budget="1GiB", data=data), longest=longest)
    assert asked == [(4, 16), (4, 16), (4, 32), (4, 32), (4, 32)]


def test_an_optimizer_that_cannot_be_planned(recipe):
    with pytest.raises(ValueError, match=r"'adafactor' cannot be planned for.*adamw_torch"):
        planned(recipe(memory_budget="1GiB", train={"optimizer": "adafactor"}))


def test_nothing_fits_is_said_before_weights_are_loaded(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("velora_torch.training.models.load_model", None)
    train = {**FIXED, "gradient_checkpointing": 1}
    with pytest.raises(ValueError, match=r"Nothing fits. The smallest needs .* more than there is"):
        go(recipe(memory_budget="200KiB", train=train))
    with pytest.raises(ValueError, match="below the weights alone"):
        go(recipe(memory_budget="10KiB", train=train))
    assert not (tmp_path / "run").exists()


def test_a_run_within_a_budget(recipe, tmp_path, monkeypatch):
    shapes = first_batches(monkeypatch)
    lines: list[str] = []
    results = go(recipe(memory_budget="1GiB", train={**FIXED, "steps": 2}), lines.append)
    assert any(line.startswith("plan: full, VeLoRA on all-linear (M=4)") for line in lines)
    written = read_results(tmp_path / "run/results.json")
    assert written.prediction == results.prediction
    assert results.prediction.budget_bytes == 2**30
    # What the run holds after its first backward pass is within what was predicted.
    held = results.memory
    assert shapes[0] == (4, 16)
    assert held.weights + held.gradients + held.optimizer_state <= results.prediction.peak_bytes
    taken = RunFolder(tmp_path / "run").load_recipe()
    assert taken.train.longest_first
    assert taken.train.gradient_checkpointing is False


def test_a_preview_shows_the_plan(recipe):
    lines: list[str] = []
    budget.preview(recipe(memory_budget="1GiB", train=FIXED), lines.append)
    assert "16 tokens, within 1.00 GiB" in lines[-1]
    assert "VeLoRA on all-linear (M=4)" in lines[-1]
    with pytest.raises(ValueError, match="nothing fits"):
        budget.preview(recipe(memory_budget="200KiB", train=FIXED), lines.append)
    assert "more than there is" in lines[-1]
