"""Which layers are looked at, and what their kinds are called."""

from __future__ import annotations

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

from tests import tiny_models
from velora_torch.adapters import add_ssf
from velora_torch.analysis.layers import kinds_of, layers_of
from velora_torch.training.schema import Recipe


def recipe(**sections):
    return Recipe.model_validate({"data": {"train": "trec"}, **sections})


def kinds(model, **sections):
    return {layer.kind for layer in layers_of(model, recipe(**sections), [4]).found.values()}


def test_kinds_of_real_models():
    llama = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds(tiny_models.llama()) == llama
    assert kinds(tiny_models.gpt2()) == {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}
    bert = {"query", "key", "value", "attention.output.dense", "intermediate.dense"}
    assert bert < kinds(tiny_models.bert())
    assert "layer.output.dense" in kinds(tiny_models.bert())


def test_kinds_of_names_that_end_alike():
    assert kinds_of(["a.0.x", "a.1.x", "b.x", "x"]) == {
        "a.0.x": "a.x",
        "a.1.x": "a.x",
        "b.x": "b.x",
        "x": "x",
    }
    assert kinds_of(["0", "1"]) == {"0": "0", "1": "1"}
    assert kinds_of([""]) == {"": ""}


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_of_lora_the_down_projections_are_looked_at():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_models.llama(), config)
    assert kinds(model) == {"q_proj.lora_A.default", "v_proj.lora_A.default"}


def test_targets_come_from_the_recipe():
    assert kinds(tiny_models.llama(), velora={"targets": ["v_proj"]}) == {"v_proj"}
    with pytest.raises(ValueError, match=r"'v_prj' matches no layer; nearest: .*v_proj"):
        kinds(tiny_models.llama(), velora={"targets": ["v_prj"]})


def test_groups_beyond_the_features_are_skipped_and_said():
    layers = layers_of(tiny_models.llama(), recipe(), [3, 32, 40])
    down = layers.found["model.layers.0.mlp.down_proj"]
    assert (down.features, down.outputs) == (40, 32)
    assert down.sizes == ((3, 14), (32, 2), (40, 1))
    assert layers.found["model.layers.1.mlp.up_proj"].sizes == ((3, 11), (32, 1))
    assert layers.skipped["40 groups in up_proj"] == "more than the layers' 32 input features"
    assert len(layers.skipped) == 6
    with pytest.raises(ValueError, match=r"nothing is left to analyze:\n  41 groups in q_proj"):
        layers_of(tiny_models.llama(), recipe(), [41])


def test_scales_are_left_out():
    model = add_ssf(tiny_models.vit(), head=["classifier"])
    with pytest.raises(ValueError, match="its gradient is no product of matrices"):
        layers_of(model, recipe(velora={"targets": ["ssf"]}), [4])
