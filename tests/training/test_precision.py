"""What a recipe computes in, and when its products go through float32."""

from __future__ import annotations

import pytest
import torch

from tests.training import tiny
from velora_torch.half_products import are_float32
from velora_torch.report.environment import machine_info
from velora_torch.training import precision
from velora_torch.training.precision import half_type, products_of
from velora_torch.training.recipe import load_recipe
from velora_torch.training.run import Options, run

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def recipe(tmp_path):
    def make(dtype, autocast=False):
        model, data = tiny.save_model(tmp_path / "model"), tiny.save_rows(tmp_path / "rows.jsonl")
        written = tiny.recipe_dict(model, data, tmp_path / "run")
        path = tiny.save_recipe(tmp_path / "recipe.yaml", written | {"dtype": dtype})
        return load_recipe(path, [f"train.autocast={str(autocast).lower()}", "train.steps=1"])

    return make


@pytest.mark.parametrize(
    ("dtype", "autocast", "expected"),
    [
        ("bfloat16", False, BF16),
        ("float16", False, FP16),
        ("float32", False, None),
        ("float32", True, BF16),
    ],
)
def test_the_type_that_a_recipe_computes_in(recipe, dtype, autocast, expected):
    assert half_type(recipe(dtype, autocast)) == expected


@pytest.mark.parametrize(
    ("slow", "dtypes", "through_float32"),
    [
        ((FP16,), ["bfloat16"], False),  # as many CPUs for servers are
        ((FP16,), ["bfloat16", "float16"], True),
        ((BF16, FP16), ["bfloat16"], True),
        ((BF16, FP16), ["float32"], False),
        ((), ["bfloat16"], False),
    ],
)
def test_products_change_only_for_the_types_in_use(
    recipe, monkeypatch, slow, dtypes, through_float32
):
    """Elsewhere they stay PyTorch's own, without a detour over Python."""
    monkeypatch.setattr(precision, "slow_types", lambda: slow)
    with products_of(*map(recipe, dtypes)):
        assert are_float32() == through_float32
        assert machine_info().half_products == ("float32" if through_float32 else "native")
    assert not are_float32()


@pytest.mark.parametrize("slow", [(FP16,), (BF16, FP16)])
def test_a_run_says_when_its_products_go_through_float32(recipe, monkeypatch, slow):
    monkeypatch.setattr(precision, "slow_types", lambda: slow)
    lines = []
    results = run(recipe("bfloat16"), Options(report=False), lines.append)
    through = BF16 in slow
    assert any("no bfloat16 instructions" in line for line in lines) == through
    assert results.run.machine.half_products == ("float32" if through else "native")
