"""Coefficients alone on quantised models: they train, and nothing of them is lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_torch
from velora_torch import VeloraConfig, export_lora
from velora_torch.checkpoint import load_state, save_state
from velora_torch.integrations.bitsandbytes import keep_differentiable
from velora_torch.layers.quantized import CompressedQuantized, bases_alone, dequantise
from velora_torch.model import compressed_layers

from ..closeness import assert_bitwise, assert_close
from ..tiny_models import bert, llama, loss_of, run, step, token_batch, token_batches, train
from .cases import BASES, DTYPE, QUANTISED, config, convert

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
]
ADAMW = torch.optim.AdamW
BUILD = {"llama": llama, "bert": bert}


def quantised(base: str, model: str = "llama") -> Any:
    converted = convert(BUILD[model](), base, skip="lm_head" if model == "llama" else "cls")
    keep_differentiable(converted)
    return converted.eval()


def trained(base: str, model: str = "llama", steps: int = 3, **settings: Any) -> Any:
    compressed = velora_torch.compress(quantised(base, model), config(**settings))
    train(compressed, token_batches(steps), ADAMW, lr=1e-2, weight_decay=0.0)
    return compressed


def coefficients(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.coef.detach() for name, layer in compressed_layers(model).items()}


def unquantised(model: Any) -> Any:
    """The same model with the numbers that its quantised layers compute with."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data = dequantise(module, torch.float32)
            if module.bias is not None:
                plain.bias.data = module.bias.data
            model.set_submodule(name, plain)
    return model.float()


@pytest.mark.parametrize("model", BUILD)
@pytest.mark.parametrize("base", BASES)
def test_a_few_steps_lower_the_loss(base: str, model: str):
    compressed = velora_torch.compress(quantised(base, model), config())
    layers = compressed_layers(compressed)
    assert len(layers) == (14 if model == "llama" else 13)
    of_blocks = [layer for name, layer in layers.items() if "layer" in name]
    assert all(isinstance(m, CompressedQuantized) == (base in QUANTISED) for m in of_blocks)
    trainable = [n for n, p in compressed.named_parameters() if p.requires_grad]
    assert trainable == [f"{name}.coef" for name in layers]
    before = loss_of(compressed, token_batch()).item()
    train(compressed, [token_batch()] * 8, ADAMW, lr=1e-2)
    assert loss_of(compressed, token_batch()).item() < 0.9 * before


@pytest.mark.parametrize("make", [torch.optim.SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("model", BUILD)
@pytest.mark.parametrize("base", BASES)
def test_the_exported_adapter_is_the_model(base: str, model: str, make: Any, tmp_path: Path):
    peft = pytest.importorskip("peft")
    plain = quantised(base, model)
    compressed = velora_torch.compress(copy.deepcopy(plain), config())
    settings = {"lr": 3.0} if make is torch.optim.SGD else {"lr": 1e-2, "weight_decay": 0.1}
    train(compressed, token_batches(3), make, **settings)
    x = token_batch(9)
    y = run(compressed, x).detach()
    assert (y - run(plain, x)).abs().max() > 2e-2 * y.abs().max()
    export_lora(compressed, tmp_path)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert_close(run(adapted, x), y, 3e-2)
    # Merged weights: the adapter on the same base without quantisation.
    whole = peft.PeftModel.from_pretrained(unquantised(copy.deepcopy(plain)), tmp_path)
    merged = whole.merge_and_unload().eval()
    assert type(merged) is type(plain)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert_close(run(merged, x), y, 3e-2)


@pytest.mark.parametrize("base", BASES)
def test_saving_and_resuming_is_bitwise(base: str, tmp_path: Path):
    model = velora_torch.compress(quantised(base), config(init="random"))
    optimizer = train(model, token_batches(2), ADAMW, lr=1e-2)
    save_state(model, tmp_path)
    resumed = velora_torch.compress(quantised(base), config(init="random"))
    load_state(resumed, tmp_path)
    assert_bitwise(run(resumed, token_batch(9)), run(model, token_batch(9)))
    again = ADAMW([p for p in resumed.parameters() if p.requires_grad], 1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_optimizer in ((model, optimizer), (resumed, again)):
        each.train()
        step(each, its_optimizer, token_batch(3))
    for name, coef in coefficients(model).items():
        assert_bitwise(coefficients(resumed)[name], coef)


@pytest.mark.parametrize("base", QUANTISED)
def test_the_state_does_not_hold_the_base(base: str, tmp_path: Path):
    from safetensors.torch import load_file

    save_state(trained(base), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert {name.rpartition(".")[2] for name in load_file(file)} == {"coef", "vectors"}


@pytest.mark.parametrize("base", QUANTISED)
def test_nothing_is_folded_into_a_quantised_weight(base: str):
    model = trained(base)
    before, y = coefficients(copy.deepcopy(model)), run(model, token_batch())
    for forbidden in (velora_torch.fold, velora_torch.restore):
        with pytest.raises(ValueError, match=r"nothing can be folded.*export_lora"):
            forbidden(model)
    for name, coef in coefficients(model).items():
        assert_bitwise(coef, before[name])
    assert_bitwise(run(model, token_batch()), y)


@pytest.mark.parametrize("base", QUANTISED)
def test_pending_coefficients_are_thrown_away_when_told(base: str):
    plain, model = quantised(base), trained(base)
    velora_torch.restore(model, drop_pending=True)
    assert not compressed_layers(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert_bitwise(run(model, token_batch()), run(plain, token_batch()))


@pytest.mark.parametrize("base", QUANTISED)
def test_a_checkpoint_does_not_lose_pending_coefficients(base: str, tmp_path: Path):
    model = trained(base)
    with pytest.raises(ValueError, match=r"cannot hold the pending coefficients.*export_lora"):
        model.state_dict()
    with pytest.raises(ValueError, match=r"cannot hold the pending coefficients.*export_lora"):
        model.save_pretrained(tmp_path / "model")
    with bases_alone():
        keys = model.state_dict().keys()
    assert keys == quantised(base).state_dict().keys()


def test_a_frozen_bf16_base_can_be_merged():
    model = trained("frozen-bf16")
    y = run(model, token_batch())
    base = quantised("frozen-bf16")
    assert not torch.equal(
        model.state_dict()["model.layers.0.mlp.up_proj.weight"],
        base.state_dict()["model.layers.0.mlp.up_proj.weight"],
    )
    velora_torch.restore(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert_close(run(model, token_batch()), y, 2e-2)


def test_another_kind_of_optimizer_is_refused():
    model = trained("nf4")
    with pytest.raises(ValueError, match="nothing can be folded into it: go on with an optimizer"):
        train(model, token_batches(1), torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("base", QUANTISED)
def test_summary(base: str):
    model = trained(base)
    found = velora_torch.summary(model)
    up = found.compressed["model.layers.0.mlp.up_proj"]
    assert (up.outputs, up.features, up.weights, up.pending) == (40, 32, 40 * 32, True)
    assert found.exact["model.norm"] == "frozen: keeps no input"
    assert found.exact["lm_head"].startswith("output head of the model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fold_every": 1}, r"nothing can be folded into a 4-bit weight.*set fold_every=None"),
        ({"fold_every": None, "gradient": "dense"}, "a frozen weight gets no gradient"),
        ({"fold_every": None, "refresh_every": 5}, "new vectors may only be drawn after a fold"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        VeloraConfig(train_frozen=True, **settings)
    with pytest.raises(ValueError, match="train_frozen must be True or False"):
        VeloraConfig(train_frozen="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("named", [True, False], ids=["named", "all-linear"])
def test_bases_of_adapters_are_left_alone(named: bool):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["v_proj"])
    model = peft.get_peft_model(quantised("nf4"), settings)
    targets = {"targets": ["v_proj"]} if named else {}
    velora_torch.compress(model, config(**targets))
    assert {n.rpartition(".")[0][-6:] for n in compressed_layers(model)} == {"lora_A"}
    exact = velora_torch.summary(model).exact
    base = exact["base_model.model.model.layers.0.self_attn.v_proj.base_layer"]
    assert base.startswith("frozen beside PEFT adapters, which train the model")


# ------------------------------------------------------------------ unknown quantised layers


class CodesLinear(nn.Linear):
    """A subclass with integer codes in its weight and a forward of its own."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        codes = torch.randint(-8, 8, (outputs, features), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).t()


class CodesModule(nn.Module):
    """No linear layer and no parameter: packed codes in a buffer, as GPTQ and AWQ have."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = features, outputs
        self.register_buffer("qweight", torch.zeros(features // 8, outputs, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


@pytest.mark.parametrize("kind", [CodesLinear, CodesModule])
@pytest.mark.parametrize("train_frozen", [True, False])
def test_unknown_quantised_layers(kind: Any, train_frozen: bool):
    model = nn.Sequential(kind(16, 16), nn.Linear(16, 8))
    settings = {"num_groups": 4, "train_frozen": train_frozen, "fold_every": None}
    velora_torch.compress(model, VeloraConfig(**settings))
    reason = velora_torch.summary(model).exact["0"]
    assert reason.startswith(f"{kind.__name__} is a quantised layer of a kind that is not known")
    assert "Linear4bit (nf4, fp4) and Linear8bitLt" in reason
    velora_torch.restore(model)
    with pytest.raises(ValueError, match=f"leaves nothing to compress:\n  0: {kind.__name__} is"):
        velora_torch.compress(model, VeloraConfig(targets=["0"], **settings))


def test_a_layer_that_is_not_quantised_yet():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32), nn.Linear(32, 8))
    with pytest.raises(ValueError, match="0: Linear4bit has not quantised its weight yet"):
        velora_torch.compress(model, config(targets=["0"]))


def test_subclasses_with_a_forward_of_their_own():
    bnb = pytest.importorskip("bitsandbytes")

    class Mine(bnb.nn.Linear4bit):  # type: ignore[name-defined,misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(Mine(64, 32).to("cpu"))
    with pytest.raises(ValueError, match="0: Mine brings a forward of its own"):
        velora_torch.compress(model, config())


def test_activations_quantised_by_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32).to(DTYPE))
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="only weight-only layers are supported"):
        velora_torch.compress(model, config())


# ------------------------------------------------------------------ when something fails


@pytest.mark.parametrize("base", BASES)
def test_a_compression_that_fails_leaves_frozen_layers_frozen(base: str, monkeypatch: Any):
    from velora_torch.layers.base import CompressedLayer

    model = quantised(base)
    kinds = {name: type(module) for name, module in model.named_modules()}
    y = run(model, token_batch())
    start, calls = CompressedLayer.start, []

    def fail(self: Any, *args: Any) -> None:
        start(self, *args)
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError

    monkeypatch.setattr(CompressedLayer, "start", fail)
    with pytest.raises(MemoryError):
        velora_torch.compress(model, config())
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not any(p.requires_grad for p in model.parameters())
    assert not any("coef" in name for name, _ in model.named_parameters())
    assert_bitwise(run(model, token_batch()), y)


def test_states_from_before_train_frozen_are_read(tmp_path: Path, monkeypatch: Any):
    settings = VeloraConfig(num_groups=4)
    model = velora_torch.compress(llama(), settings)
    train(model, token_batches(1))
    to_dict = VeloraConfig.to_dict

    def without(self: VeloraConfig) -> dict[str, Any]:
        return {k: v for k, v in to_dict(self).items() if k != "train_frozen"}

    with monkeypatch.context() as patch:
        patch.setattr(VeloraConfig, "to_dict", without)
        save_state(model, tmp_path)
    load_state(velora_torch.compress(llama(), settings), tmp_path)
