"""Names, configurations and modules become fake models of the right shape, depth and type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.blocks import cut, repeated_blocks, uniform_depth
from velora_torch.memory.fake import FakeWorld
from velora_torch.memory.simulator.architecture import Architecture, resolve
from velora_torch.memory.simulator.four_bit import Linear4bit, layer_bytes
from velora_torch.memory.simulator.presets import PRESETS

from ... import tiny_models

pytest.importorskip("transformers")

# Counted by hand: embedding, blocks, norms, head.
MILLIONS = {
    "llama-3m": 19.5,
    "llama-15m": 38.7,
    "llama-60m": 58.1,
    "llama-130m": 134.1,
    "llama-350m": 368.0,
    "llama-1b": 1339.1,
    "llama-7b": 6738.4,
    "llama-13b": 13015.9,
    "roberta-base": 124.6,
    "vit-b-16": 85.9,
    "smollm2-135m-instruct": 134.5,
}


SMALL_MODELS = [
    tiny_models.llama,
    tiny_models.gpt2,
    tiny_models.bert,
    tiny_models.t5,
    tiny_models.vit,
    tiny_models.mixtral,
]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def run(architecture: Architecture, **size: Any) -> tuple[nn.Module, Tensor]:
    """Build a model and train one step of it."""
    world = FakeWorld()
    model = architecture.build(world, torch.bfloat16, **size)
    batch = architecture.batch(world, 2, None)
    with world:
        loss = architecture.loss(model, batch)
        loss.backward()
    return model, loss


# ------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str):
    architecture = resolve(name)
    assert architecture.name == name
    full = architecture.build(FakeWorld(), torch.bfloat16)
    assert round(parameters(full) / 1e6, 1) == MILLIONS[name]
    model, loss = run(architecture, depth=1)
    assert loss.shape == ()
    assert model.training
    assert all(isinstance(p, FakeTensor) for p in [*full.parameters(), *model.parameters()])
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "depth", "vocab", "positions"),
    [
        ("llama-7b", 32, 32000, 2048),
        ("roberta-base", 12, None, 512),  # two of 514 positions lie before the first token
        ("vit-b-16", 12, None, None),
        ("smollm2-135m-instruct", 30, 49152, 8192),
    ],
)
def test_what_is_known_about_a_preset(
    name: str, depth: int, vocab: int | None, positions: int | None
):
    architecture = resolve(name)
    assert (architecture.depth, architecture.vocab) == (depth, vocab)
    if positions is None:
        assert architecture.seq() is None
        return
    assert architecture.seq(positions) == positions
    assert architecture.seq() == min(1024, positions)
    with pytest.raises(ValueError, match=f"between 1 and {positions}.*got {positions + 1}"):
        architecture.batch(FakeWorld(), 1, positions + 1)


def test_depth_changes_the_blocks_alone():
    architecture = resolve("llama-60m")
    sizes = [parameters(architecture.build(FakeWorld(), torch.bfloat16, d)) for d in (1, 2, 3)]
    block = 4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == block
    assert sizes[0] == block + 2 * 32000 * 512 + 512
    with pytest.raises(ValueError, match="between 1 and 8"):
        architecture.build(FakeWorld(), torch.bfloat16, 9)


def test_batches():
    world = FakeWorld()
    batch = resolve("llama-60m").batch(world, 3, 17)
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "input_ids": ((3, 17), torch.int64),
        "labels": ((3, 17), torch.int64),
    }
    batch = resolve("roberta-base").batch(world, 3, 17)
    assert {k: tuple(v.shape) for k, v in batch.items()} == {"input_ids": (3, 17), "labels": (3,)}
    vit = resolve("vit-b-16")
    vit.build(world, torch.float16, 1)
    batch = vit.batch(world, 3, None)
    assert (batch["pixel_values"].shape, batch["labels"].shape) == ((3, 3, 224, 224), (3,))
    assert batch["pixel_values"].dtype == torch.float16
    assert all(isinstance(tensor, FakeTensor) for tensor in batch.values())
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        vit.batch(world, 0, None)


# ------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    "make",
    SMALL_MODELS,
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("source", ["config", "folder", "file", "model"])
def test_every_source_gives_the_same_model(make: Any, source: str, tmp_path: Path):
    # In bfloat16, the one type for which torch's grouped product of experts has a fake form.
    original = make().to(torch.bfloat16)
    original.config.save_pretrained(tmp_path)
    given = {
        "config": original.config,
        "folder": tmp_path,
        "file": str(tmp_path / "config.json"),
        "model": original,
    }[source]
    if not original.config.architectures:
        original.config.architectures = [type(original).__name__]
        original.config.save_pretrained(tmp_path)
    before = {name: p.clone() for name, p in original.named_parameters()}
    model, loss = run(resolve(given))
    assert type(model).__name__ == type(original).__name__
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert loss.requires_grad
    assert all(torch.equal(p, before[n]) for n, p in original.named_parameters())
    assert not any(p.grad is not None for p in original.parameters())
    assert not original.training


def test_type_of_a_configuration():
    architecture = resolve(tiny_models.llama().config)
    dtypes = [
        next(architecture.build(FakeWorld(), dtype).parameters()).dtype
        for dtype in (None, torch.float16, torch.float32)
    ]
    assert dtypes == [torch.float32, torch.float16, torch.float32]


def test_classes_are_chosen():
    from transformers import BertConfig, GPT2Config, LlamaConfig

    small: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 50}
    classifier = LlamaConfig(
        **small,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        architectures=["LlamaForSequenceClassification"],
    )
    model, _ = run(resolve(classifier))
    assert type(model).__name__ == "LlamaForSequenceClassification"
    bert = BertConfig(**small, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    for config, expected in ((bert, "BertForMaskedLM"), (GPT2Config(), "GPT2LMHeadModel")):
        model = resolve(config).build(FakeWorld(), torch.float32, 1)
        assert type(model).__name__ == expected


def test_a_configuration_is_left_alone():
    config = tiny_models.llama().config
    before = config.to_dict()
    run(resolve(config), depth=1)
    assert config.to_dict() == before


def test_no_cache():
    model = resolve(tiny_models.llama()).build(FakeWorld(), None)
    assert not model.config.use_cache  # type: ignore[union-attr]


# ------------------------------------------------------------------ modules


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([tiny_models.Net(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        for block in self.blocks:
            x = block(x)
        return x, {"twice": 2 * x, "count": torch.tensor(3)}


def test_a_module_of_ones_own():
    architecture = resolve(Pair().bfloat16())
    assert (architecture.name, architecture.depth, architecture.vocab) == ("Pair", 3, None)
    with pytest.raises(ValueError, match=r"what Pair reads is unknown.*give one: a dict"):
        architecture.batch(FakeWorld(), 1, None)
    world = FakeWorld()
    model = architecture.build(world, torch.float64, 2)
    assert len(model.blocks) == 2  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # as it was built
    with world:
        x = torch.zeros(4, 8, dtype=torch.bfloat16)
        for batch in (x, (x,), {"x": x}):
            loss = architecture.loss(model, batch)
            assert (loss.shape, loss.dtype) == ((), torch.float32)


def test_the_loss_of_a_module_without_one():
    model = Pair()
    x = torch.randn(4, 8)
    y = model(x)[0]
    assert torch.allclose(resolve(model).loss(model, x), 3 * y.sum())
    with pytest.raises(ValueError, match="neither a loss nor floating tensors"):
        resolve(model).loss(Counts(), x)


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(x.shape[0])


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_module_without_data(kind: str):
    model = Pair()
    given = model.to("meta") if kind == "meta" else FakeWorld().model(model)
    architecture = resolve(given)
    world = FakeWorld()
    built = architecture.build(world, None, 2)
    with world:
        architecture.loss(built, torch.zeros(4, 8)).backward()
    assert all(p.grad is not None for p in built.parameters())


def test_every_build_is_a_new_model():
    architecture, world = resolve(Pair()), FakeWorld()
    first, second = (architecture.build(world, None) for _ in range(2))
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_a_compressed_model():
    model = tiny_models.llama()
    velora_torch.compress(model, VeloraConfig(num_groups=4))
    architecture = resolve(model)
    assert architecture.depth == 2
    built, _ = run(architecture, depth=1)
    trained = [n for n, p in built.named_parameters() if p.grad is not None]
    assert sum(name.endswith("coef") for name in trained) == 7


def test_quantised_layers_have_stand_ins():
    bnb = pytest.importorskip("bitsandbytes")
    model = Pair()
    layer = bnb.nn.Linear4bit(8, 16, compute_dtype=torch.bfloat16, quant_type="nf4")
    model.blocks[1].first = layer.to("cpu")  # type: ignore[assignment]
    world = FakeWorld()
    built = resolve(model).build(world, None)
    stand_in = built.blocks[1].first  # type: ignore[index, union-attr]
    assert isinstance(stand_in, Linear4bit)
    assert sum(t.nbytes for t in [*stand_in.parameters(), *stand_in.buffers()]) == (
        layer_bytes((16, 8)) + 4 * 16
    )
    with world:
        resolve(model).loss(built, torch.zeros(4, 8)).backward()
    assert model.blocks[1].first is layer  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapted_model_reads_what_its_base_reads():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    architecture = resolve(peft.get_peft_model(tiny_models.llama(), config))
    assert (architecture.depth, architecture.vocab) == (2, tiny_models.VOCABULARY)
    model, _ = run(architecture, depth=1)
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2
    assert all("lora_" in name for name in trained)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lama-7b", "did you mean llama-7b"),
        ("nobody/nothing", "neither in the hub's local cache nor.*path of that"),
        ("./nowhere", r"no folder or file ./nowhere; presets: llama-3m"),
        ("nowhere.json", "no folder or file"),
    ],
)
def test_unknown_names(name: str, message: str, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_bad_files(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        resolve(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        resolve(file)
    file.write_text(json.dumps({"model_type": "lama"}))
    with pytest.raises(ValueError, match=r"model_type 'lama'.*nearest:.*llama"):
        resolve(tmp_path)
    with pytest.raises(TypeError, match="got int"):
        resolve(3)  # type: ignore[arg-type]


def test_a_type_without_a_head():
    from transformers import CLIPVisionConfig

    with pytest.raises(ValueError, match="no language model or classifier of model_type 'clip_vis"):
        resolve(CLIPVisionConfig())


# ------------------------------------------------------------------ blocks


def block(width: int = 8) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, 16)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (tiny_models.llama, ["model.layers"]),
        (tiny_models.gpt2, ["transformer.h"]),
        (tiny_models.t5, ["encoder.block", "decoder.block"]),
        (tiny_models.mixtral, ["model.layers"]),  # not the experts inside of them
    ],
)
def test_lists_of_blocks(make: Any, names: list[str]):
    model = make()
    assert [name for name, _ in repeated_blocks(model)] == names
    assert uniform_depth(model) == (2 if len(names) == 1 else None)


def test_what_is_no_list_of_blocks():
    heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    one = nn.ModuleList([block()])
    empty = nn.ModuleList([nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())])
    whole = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 4)))
    assert repeated_blocks(nn.ModuleList([heads, one, empty, whole])) == []


def test_sequential_blocks():
    model = nn.ModuleDict({"stem": nn.Linear(8, 8), "blocks": nn.Sequential(*map(block, [8] * 4))})
    assert [name for name, _ in repeated_blocks(model)] == ["blocks"]
    assert uniform_depth(cut(model, 3)) == 3


def test_blocks_that_differ():
    different = [nn.ModuleList([block(8), block(16)])]
    shared = block()
    different.append(nn.ModuleList([shared, shared]))
    local, wide = block(), block()
    local.window = 4  # type: ignore[assignment]
    wide.window = None  # type: ignore[assignment]
    different.append(nn.ModuleList([local, wide]))
    frozen = nn.ModuleList([block(), block()])
    frozen[0].requires_grad_(False)
    different.append(frozen)
    for blocks in different:
        assert len(repeated_blocks(blocks)) == 1
        assert uniform_depth(blocks) is None
    counted = nn.ModuleList([block(), block()])
    for index, layer in enumerate(counted):
        layer.layer_idx = index  # type: ignore[assignment]
        layer.prefix = f"layers.{index}"  # type: ignore[assignment]
    assert uniform_depth(counted) == 2


def test_cut_refuses():
    with pytest.raises(ValueError, match=r"lists of this T5\w+: encoder.block, decoder.block"):
        cut(tiny_models.t5(), 1)
    with pytest.raises(
        ValueError, match=r"between 1 and 2, the number of blocks in 'model\.layers'"
    ):
        cut(tiny_models.llama(), 0)
