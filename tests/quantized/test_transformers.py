"""Checkpoints of transformers' quantised models: written, resumed and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import velora_torch
from velora_torch import export_lora
from velora_torch.checkpoint import load_state, save_state
from velora_torch.integrations.bitsandbytes import keep_differentiable
from velora_torch.model import compressed_layers

from ..closeness import assert_bitwise, assert_close
from ..tiny_models import llama, run, token_batch, token_batches, train
from .cases import DTYPE, config

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
BASES = list(SETTINGS)


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    llama().to(DTYPE).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(folder: Path, base: str | None) -> Any:
    """A frozen model; ``base`` says how a plain checkpoint is quantised."""
    settings: dict[str, Any] = {"dtype": DTYPE, "device_map": {"": "cpu"}}
    if base is not None:
        four = {"bnb_4bit_compute_dtype": DTYPE} if "nf4" in base else {}
        quantise = transformers.BitsAndBytesConfig(**SETTINGS[base], **four)
        settings["quantization_config"] = quantise
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    keep_differentiable(model)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("base", BASES)
def test_a_base_saved_by_transformers_takes_the_adapter(
    base: str, plain_folder: Path, tmp_path: Path
):
    peft = pytest.importorskip("peft")
    model = velora_torch.compress(load(plain_folder, base), config())
    load(plain_folder, base).save_pretrained(tmp_path / "base")
    train(model, token_batches(3), torch.optim.AdamW, lr=1e-2)
    y = run(model, token_batch(9)).detach()
    export_lora(model, tmp_path / "adapter")
    again = load(tmp_path / "base", None)
    assert type(again.model.layers[0].mlp.up_proj).__name__.startswith("Linear")
    adapted = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert_close(run(adapted, token_batch(9)), y, 3e-2)


@pytest.mark.parametrize("base", ["nf4", "nf4-double"])
def test_merging_into_the_dequantised_model(base: str, plain_folder: Path, tmp_path: Path):
    """What the documentation tells who wants plain weights."""
    peft = pytest.importorskip("peft")
    model = velora_torch.compress(load(plain_folder, base), config())
    train(model, token_batches(3), torch.optim.AdamW, lr=1e-2)
    y = run(model, token_batch(9)).detach()
    export_lora(model, tmp_path / "adapter")
    plain = load(plain_folder, base).dequantize()
    merged = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    final = load(tmp_path / "merged", None)
    assert type(final.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert_close(run(final, token_batch(9)), y, 3e-2)


def trainer(model: Any, folder: Path, steps: int, **settings: Any) -> Any:
    from velora_torch.integrations.transformers import VeloraTrainerMixin

    class Trainer(VeloraTrainerMixin, transformers.Trainer):  # type: ignore[name-defined,misc]
        pass

    rows = [
        {"input_ids": ids, "labels": ids}
        for seed in range(4)
        for ids in token_batch(seed)["input_ids"]
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=100,
        **{"save_steps": 2} | settings,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])


def coefficients(model: Any) -> dict[str, Tensor]:
    return {name: layer.coef.detach() for name, layer in compressed_layers(model).items()}


@pytest.mark.parametrize("base", BASES)
def test_the_trainer_trains_saves_and_resumes(base: str, plain_folder: Path, tmp_path: Path):
    def fresh() -> Any:
        return velora_torch.compress(load(plain_folder, base), config())

    whole = fresh()
    trainer(whole, tmp_path / "whole", 4).train()
    trainer(fresh(), tmp_path / "cut", 2).train()
    resumed = fresh()
    trainer(resumed, tmp_path / "cut", 4).train(str(tmp_path / "cut" / "checkpoint-2"))
    for name, coef in coefficients(whole).items():
        assert coef.any()
        assert_bitwise(coefficients(resumed)[name], coef)
    # Beside the coefficients, a checkpoint is the quantised model, which loads without velora.
    loaded = load(tmp_path / "whole" / "checkpoint-4", None)
    assert_bitwise(run(loaded, token_batch()), run(load(plain_folder, base), token_batch()))


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_the_best_checkpoint_is_loaded_at_the_end(base: str, plain_folder: Path, tmp_path: Path):
    """Its coefficients too, which lie beside its weights."""
    model = velora_torch.compress(load(plain_folder, base), config())
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    # The worst is taken for the best: the first one.
    best = {"metric_for_best_model": "loss", "greater_is_better": True}
    run_of_three = trainer(model, tmp_path, 3, load_best_model_at_end=True, **settings, **best)
    run_of_three.train()
    assert run_of_three.state.best_model_checkpoint.endswith("checkpoint-1")
    first = velora_torch.compress(load(plain_folder, base), config())
    load_state(first, tmp_path / "checkpoint-1")
    for name, coef in coefficients(first).items():
        assert coef.any()
        assert_bitwise(coefficients(model)[name], coef)


def test_without_coefficients_the_trainer_refuses_as_ever(plain_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(load(plain_folder, "nf4"), tmp_path, 1)


@pytest.mark.parametrize("base", BASES)
def test_a_quantised_checkpoint_next_to_its_state(base: str, plain_folder: Path, tmp_path: Path):
    model = velora_torch.compress(load(plain_folder, base), config())
    model.save_pretrained(tmp_path / "before")  # nothing is pending yet
    train(model, token_batches(1), torch.optim.AdamW, lr=1e-2)
    with pytest.raises(ValueError, match="cannot hold the pending coefficients"):
        copy.deepcopy(model).save_pretrained(tmp_path / "after")
    save_state(model, tmp_path / "after")
    assert (tmp_path / "after" / "velora_state.json").is_file()
