"""The exported adapter on the first weights is the trained model; otherwise nothing is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from velora_torch import VeloraConfig, compress, export_lora, fold, restore

from .tiny_models import batches, bert, gpt2, llama, net, run, t5, token_batch, token_batches, train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(  # PEFT reads a property that transformers renames
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
CONFIG = VeloraConfig(num_groups=4)


def frozen_embeddings(model: Any) -> Any:
    model.get_input_embeddings().requires_grad_(False)
    return model


def frozen_but(*kinds: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Train modules of these kinds only."""

    def freeze(model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, kinds):
                module.requires_grad_(True)
        return model

    return freeze


def linear_only(model: nn.Module) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    frozen_but(nn.Linear, Conv1D)(model)
    model.lm_head.requires_grad_(False)
    return model


def adapted(base: nn.Module, folder: Path, **settings: Any) -> Any:
    """What a user does with the folder."""
    return peft.PeftModel.from_pretrained(base, folder, **settings).eval()


def assert_adapter_is_the_model(
    base: nn.Module, trained: nn.Module, folder: Path, x: Any, rtol: float = 1e-5
) -> None:
    y = run(trained, x).detach()
    start = run(base, x).detach()
    assert (y - start).abs().max() > 1e-2 * y.abs().max(), "training changed too little to test"
    assert export_lora(trained, folder) == folder
    assert torch.equal(run(trained, x), y)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = adapted(copy.deepcopy(base), folder)
    torch.testing.assert_close(run(model, x), y, rtol=rtol, atol=rtol * float(y.abs().max()))
    merged = model.merge_and_unload().eval()
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(run(merged, x), y, rtol=rtol, atol=rtol * float(y.abs().max()))


@pytest.mark.parametrize("fold_every", [1, 3, None])
@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    "build",
    [llama, lambda: frozen_embeddings(llama(tied=True)), lambda: frozen_embeddings(gpt2())],
    ids=["llama", "llama-tied-frozen", "gpt2-frozen"],
)
def test_language_models(
    build: Callable[[], Any], make: Any, fold_every: int | None, tmp_path: Path
) -> None:
    model = build()
    base = copy.deepcopy(model)
    compress(model, VeloraConfig(num_groups=4, fold_every=fold_every))
    settings = {"lr": 0.3} if make is SGD else {"lr": 5e-3, "weight_decay": 0.0}
    train(model, token_batches(4), make, **settings)
    assert_adapter_is_the_model(base, model, tmp_path / "adapter", token_batch(9))


@pytest.mark.parametrize("vectors", ["shared", "per_group"])
@pytest.mark.parametrize("init", ["average", "random", "svd"])
def test_every_fixed_choice_of_vectors(init: Any, vectors: Any, tmp_path: Path) -> None:
    model = net(width=15)
    base = copy.deepcopy(model)
    compress(model, VeloraConfig(num_groups=4, init=init, vectors=vectors))
    train(model, batches(4, width=15), ADAMW, lr=0.01, weight_decay=0.0)
    assert_adapter_is_the_model(base, model, tmp_path, batches(1, width=15)[0])


def test_ranks_of_each_layer(tmp_path: Path) -> None:
    model = llama()
    base = copy.deepcopy(model)
    groups = {"v_proj": 2, "0.mlp.down_proj": 8, "default": 4}
    compress(model, VeloraConfig(num_groups=groups))
    train(model, token_batches(4), ADAMW, lr=5e-3, weight_decay=0.0)
    assert_adapter_is_the_model(base, model, tmp_path, token_batch(9))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert sorted(config["rank_pattern"].values()) == [2, 2, 8]
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_linear_layers_alone_are_a_pure_lora_adapter(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = linear_only(llama())
    base = copy.deepcopy(model)
    compress(model, CONFIG)
    train(model, token_batches(4), ADAMW, lr=5e-3, weight_decay=0.0)
    assert_adapter_is_the_model(base, model, tmp_path, token_batch(9))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_A." in key or ".lora_B." in key for key in tensors)
    assert len(tensors) == 2 * 14
    a = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert a.shape == (4, 32)
    assert ((a != 0).sum(dim=0) <= 1).all(), "block-diagonal"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None


def test_trained_biases_of_compressed_layers_are_kept(tmp_path: Path) -> None:
    model = net()
    model.norm.requires_grad_(False)
    base = copy.deepcopy(model)
    compress(model, CONFIG)
    train(model, batches(4), lr=0.1)
    assert not torch.equal(model.first.bias, base.first.bias)
    assert_adapter_is_the_model(base, model, tmp_path, batches(1)[0])


def test_layers_that_were_trained_exactly_are_stored_whole(tmp_path: Path) -> None:
    model = net()
    base = copy.deepcopy(model)
    compress(model, VeloraConfig(targets=["first"], num_groups=4))
    train(model, batches(4), lr=0.1)
    assert_adapter_is_the_model(base, model, tmp_path, batches(1)[0])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["norm", "second"]


def test_encoder_with_frozen_embeddings(tmp_path: Path) -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    model.cls.requires_grad_(False)
    base = copy.deepcopy(model)
    compress(model, CONFIG)
    train(model, token_batches(4), ADAMW, lr=5e-3, weight_decay=0.0)
    assert_adapter_is_the_model(base, model, tmp_path, token_batch(9))


def test_bfloat16_within_its_own_precision(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    base = copy.deepcopy(model)
    compress(model, CONFIG)
    train(model, token_batches(4), ADAMW, lr=5e-3, weight_decay=0.0)
    assert_adapter_is_the_model(base, model, tmp_path, token_batch(9), rtol=5e-2)


def test_the_model_trains_on_after_export(tmp_path: Path) -> None:
    model = llama()
    compress(model, VeloraConfig(num_groups=4, fold_every=None))
    optimizer = train(model, token_batches(2), SGD, lr=0.1)
    pending = model.model.layers[0].mlp.down_proj.coef.detach().clone()
    export_lora(model, tmp_path)
    assert torch.equal(model.model.layers[0].mlp.down_proj.coef, pending)
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    train(model, token_batches(1), SGD, lr=0.1)


def test_an_adapter_replaces_the_former_one(tmp_path: Path) -> None:
    model = net()
    base = copy.deepcopy(model)
    compress(model, CONFIG)
    train(model, batches(2), lr=0.1)
    export_lora(model, tmp_path)
    train(model, batches(2), lr=0.1)
    assert_adapter_is_the_model(base, model, tmp_path, batches(1)[0])


# ------------------------------------------------------------------ names that PEFT confuses


class Deep(nn.Module):
    """A root layer whose name is the end of an inner one's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
        self.fc = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner["norm"](self.inner["fc"](x)))
        return self.fc(self.norm(x))


def deep() -> Deep:
    torch.manual_seed(0)
    return Deep()


@pytest.mark.parametrize(
    "config",
    [
        VeloraConfig(targets=r"fc", num_groups=4),
        VeloraConfig(targets=lambda name, _: name == "fc", num_groups=4),
        VeloraConfig(targets=["inner.fc"], num_groups=4),
        VeloraConfig(targets=["fc"], num_groups={"inner.fc": 2, "default": 4}),
        VeloraConfig(targets=["fc"], num_groups={"inner.fc": 4, "default": 2}),
    ],
    ids=["both", "root", "inner", "inner-rank", "root-rank"],
)
@pytest.mark.parametrize("rest", ["frozen", "norms", "root-norm"])
def test_ends_of_names(config: VeloraConfig, rest: str, tmp_path: Path) -> None:
    model = deep()
    model.inner["norm"].requires_grad_(rest == "norms")
    model.norm.requires_grad_(rest != "frozen")
    chosen = compress(copy.deepcopy(model), config)
    for name in ("fc", "inner.fc"):  # layers that are not compressed are not trained
        plain = model.get_submodule(name)
        plain.requires_grad_(type(chosen.get_submodule(name)) is not nn.Linear)
    base = copy.deepcopy(model)
    compress(model, config)
    train(model, batches(4, width=8), lr=0.1)
    assert_adapter_is_the_model(base, model, tmp_path, batches(1, width=8)[0])


# ------------------------------------------------------------------ refusals


def trained(config: VeloraConfig, steps: int = 3, make: Any = SGD, **settings: Any) -> nn.Module:
    model = compress(net(), config)
    train(model, batches(steps), make, **({"lr": 0.1} | settings))
    return model


def redrawn() -> nn.Module:
    return trained(VeloraConfig(num_groups=4, init="random", refresh_every=2))


def moved() -> nn.Module:
    return trained(VeloraConfig(num_groups=4, init="running_average"))


def decayed() -> nn.Module:
    return trained(CONFIG, make=ADAMW, lr=1e-3, weight_decay=0.1)


def decayed_pending() -> nn.Module:
    config = VeloraConfig(num_groups=4, fold_every=None)
    return trained(config, make=ADAMW, lr=1e-3, weight_decay=0.1)


def dense() -> nn.Module:
    return trained(VeloraConfig(num_groups=4, gradient="dense"))


def untracked() -> nn.Module:
    return trained(VeloraConfig(num_groups=4, track_delta=False))


def two_optimizers() -> nn.Module:
    model = trained(CONFIG)
    train(model, batches(2), ADAMW, lr=1e-3, weight_decay=0.0)
    return model


def tied_and_trained() -> nn.Module:
    return compress(llama(tied=True), CONFIG)


def peft_model() -> nn.Module:
    settings = peft.LoraConfig(r=8, target_modules=["v_proj"])
    return compress(peft.get_peft_model(llama(), settings), CONFIG)


def own_parameters() -> nn.Module:
    model = net()
    model.extra = nn.Parameter(torch.zeros(2))
    return compress(model, CONFIG)


def one_layer() -> nn.Module:
    return compress(nn.Linear(8, 8), CONFIG)


def shared() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    return compress(model, CONFIG)


def confused() -> nn.Module:
    model = deep()
    return compress(model, VeloraConfig(targets=["inner.fc"], num_groups=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            redrawn,
            "layer 'first': its vectors were redrawn after coefficients had been folded. Sav",
        ),
        (moved, "layer 'first': its vectors were redrawn after coefficients had been folded"),
        (decayed, "layer 'first': weight decay has changed the base weight. Save the whole model"),
        (decayed_pending, "layer 'first': weight decay has changed the base weight"),
        (dense, "layer 'first': it was trained with gradient='dense', which keeps no coefficients"),
        (untracked, "layer 'first': its coefficients were folded with track_delta=False"),
        (two_optimizers, "layer 'first': optimizers of different kinds have trained it"),
        (tied_and_trained, r"'lm_head' and 'model.embed_tokens' share a trained weight.*Freeze it"),
        (lambda: compress(t5(), CONFIG), "share a trained weight, which an adapter cannot hold"),
        (peft_model, "this is a PEFT model already; save its adapter with model.save_pretrained"),
        (net, "cannot export a LoRA adapter: the model is not compressed"),
        (own_parameters, r"module '\(the model itself\)' trains parameters of its own"),
        (one_layer, "the model is itself one compressed layer"),
        (shared, "layer 'b' is the same module as another"),
        (confused, "trained module 'fc' is to be stored whole.* 'inner.fc' for the same"),
    ],
)
def test_refused_before_anything_is_written(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    model = make()
    folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match=message):
        export_lora(model, folder)
    assert not folder.exists()


def test_untracked_coefficients_can_be_exported_while_they_are_pending(tmp_path: Path) -> None:
    model = net()
    base = copy.deepcopy(model)
    compress(model, VeloraConfig(num_groups=4, fold_every=None, track_delta=False))
    train(model, batches(3), lr=0.1)
    assert_adapter_is_the_model(base, model, tmp_path, batches(1)[0])
    fold(model)
    with pytest.raises(ValueError, match="track_delta=False"):
        export_lora(model, tmp_path)


def test_without_peft_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = trained(CONFIG)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'velora-torch\[peft\]'"):
        export_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_restored_model_is_plain_and_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model is not compressed"):
        export_lora(restore(trained(CONFIG)), tmp_path / "adapter")


def test_the_adapter_names_its_base(tmp_path: Path) -> None:
    model = linear_only(llama())
    model.name_or_path = "somebody/tiny-llama"
    export_lora(compress(model, CONFIG), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/tiny-llama"


def test_weights_loaded_in_the_middle_cannot_be_exported(tmp_path):
    model = compress(net(), VeloraConfig(sub_token_size=4))
    train(model, batches(2))
    model.load_state_dict(net().state_dict())
    train(model, batches(2))
    with pytest.raises(ValueError, match="other weights were loaded after training had begun"):
        export_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
