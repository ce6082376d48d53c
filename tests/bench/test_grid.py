"""The order of a grid, and what makes two recipes the same."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("pydantic")

from tests.bench import fakes
from velora_torch.bench.catalogue import BENCHES
from velora_torch.bench.grid import (
    cells,
    changes,
    fingerprint,
    newest,
    row_from_json,
    row_to_json,
)


def grid(bench=None, seeds=2):
    bench = bench or fakes.make_bench()
    return cells(bench, "local", fakes.TASKS, [v.name for v in bench.variants], seeds)


def test_seeds_are_outermost_and_variants_innermost():
    assert [str(cell) for cell in grid()] == [
        f"{task}, {variant}, seed {seed}"
        for seed in (0, 1)
        for task in ("a", "b")
        for variant in ("full", "full+velora", "probe")
    ]


def changed(section, **settings):
    def recipe(task, variant, seed):
        made = fakes.recipe(task, variant, seed)
        return {**made, section: {**made[section], **settings}}

    return grid(fakes.make_bench(recipe), 1)[0].recipe


SAME = grid(seeds=1)[0].recipe


@pytest.mark.parametrize(
    "recipe",
    [
        changed("train", output="elsewhere"),
        {**SAME, "setting_of_the_future": None, "another": False, "section": {"x": []}},
    ],
    ids=["output", "new settings that are off"],
)
def test_same_fingerprint(recipe):
    assert fingerprint(recipe) == fingerprint(SAME)


@pytest.mark.parametrize(
    "recipe",
    [
        changed("train", learning_rate=2e-4),
        changed("train", autocast=True),
        changed("data", image_size=3),
        {**SAME, "setting_of_the_future": 1},
    ],
    ids=["other number", "switched on", "set", "new setting"],
)
def test_other_fingerprint(recipe):
    assert fingerprint(recipe) != fingerprint(SAME)


def test_newest_row_of_todays_recipe_counts_and_others_are_stale():
    first, second, third, *_ = grid()
    old, new = fakes.row(first, 0.1), fakes.row(first, 0.2)
    other = dataclasses.replace(fakes.row(second, 0.3), fingerprint="of another recipe")
    found, stale = newest([old, new, other], [first, second, third])
    assert found == {first: new}
    assert stale == [other]


def test_a_row_of_todays_recipe_hides_older_stale_ones():
    cell = grid()[0]
    stale = dataclasses.replace(fakes.row(cell), fingerprint="of another recipe")
    assert newest([fakes.row(cell), stale], [cell])[1] == []


def test_changes_name_the_settings():
    cell = grid()[0]
    row = fakes.row(cell, recipe=changed("train", learning_rate=0.5))
    assert list(changes(row, cell)) == ["train.learning_rate: 0.5 -> 0.0001"]


def test_a_row_survives_json():
    row = fakes.row(grid()[0], scores={"accuracy": 0.5, "f1": None})
    assert row_from_json(row_to_json(row)) == row


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("score"), "'score' is missing"),
        (lambda d: d.update(extra=1), "'extra' is not a field"),
    ],
    ids=["missing", "unknown"],
)
def test_other_json_is_refused(edit, message):
    document = row_to_json(fakes.row(grid()[0]))
    edit(document)
    with pytest.raises(ValueError, match=message):
        row_from_json(document)


# ------------------------------------------------------- the protocols as they are


PROTOCOLS = [
    pytest.param(bench, scale, id=f"{bench.name}-{scale}")
    for bench in BENCHES.values()
    for scale in bench.scales
]


@pytest.mark.parametrize(("bench", "scale"), PROTOCOLS)
def test_every_cell_has_a_valid_recipe_of_its_own(bench, scale):
    tasks, variants = bench.scales[scale].tasks, [v.name for v in bench.variants]
    made = cells(bench, scale, tasks, variants, 2)
    assert len({cell.fingerprint for cell in made}) == len(made) == 2 * len(tasks) * len(variants)
    assert bench.scales[scale].timed in tasks
    assert {v.base for v in bench.variants} - {None} < set(variants)


@pytest.mark.parametrize(("bench", "scale"), PROTOCOLS)
def test_pairs_differ_in_compression_alone(bench, scale):
    """A pair shares data, seed, epochs, batch and learning rate, but for the coefficients'."""
    task = bench.scales[scale].tasks[0]
    made = bench.scales[scale].recipe
    for variant in bench.variants:
        if variant.base is None or "+velora" not in variant.name:
            continue
        own, base = made(task, variant.name, 0), made(task, variant.base, 0)
        assert own["velora"] is not None
        assert base["velora"] is None
        own["train"]["coefficient_learning_rate"] = None  # what the base has not
        base["train"]["coefficient_learning_rate"] = None
        for part in ("model", "dtype", "method", "data", "train", "evaluate"):
            assert own[part] == base[part], part


def test_published_settings_are_in_the_paper_scale():
    recipe = BENCHES["alpaca"].scales["paper"].recipe
    small, large = recipe("7b", "qlora+velora", 0), recipe("13b", "qlora+velora", 0)
    assert (small["lora"]["r"], large["lora"]["r"]) == (32, 64)
    assert (small["train"]["epochs"], large["train"]["epochs"]) == (4, 3)
    assert small["velora"] == {
        "targets": ["v_proj", "down_proj"],
        "num_groups": 32,
        "init": "average",
        "scale": 0.1,
        "seed": 0,
    }
    glue = BENCHES["glue"].scales["paper"].recipe
    rates = {task: glue(task, "velora", 0)["train"]["learning_rate"] for task in ("cola", "rte")}
    assert rates == {"cola": 3e-5, "rte": 1e-5}
    vtab = BENCHES["vtab"].scales["paper"].recipe
    sizes = {
        name: vtab("dtd", name, 0)["velora"]["sub_token_size"]
        for name in ("full+velora", "ssf+velora", "hydra+velora", "lora+velora")
    }
    assert list(sizes.values()) == [32, 32, 4, 16]
