"""The ledger: every saved storage once, with all who hold it, and what compression really frees."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import velora_torch
from tests.tiny_models import MODELS, llama, token_batch
from velora_torch import VeloraConfig
from velora_torch.memory import explain, saved_bytes
from velora_torch.memory.fake import FakeWorld
from velora_torch.recomputation import recompute

T, D, H, O, G = 20, 16, 32, 8, 4  # noqa: E741
KINDS = ["llama", "llama-tied", "gpt2", "bert", "t5", "vit"]
CONFIG = VeloraConfig(num_groups=G)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, O))


class Block(nn.Module):
    """Attention as far as sharing goes: q, k and v are given one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.down = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(self.q(x) + self.k(x) + self.v(x))


def blocks() -> nn.Sequential:
    return nn.Sequential(Block(), Block())


class Calls(nn.Module):
    """Runs a function of the output of a linear layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(D, D), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.region = nn.Sequential(nn.Linear(D, H), nn.Sigmoid(), nn.Linear(H, D), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.region, self.first(x), use_reentrant=False)


class Half(Block):
    """Leaves a layer out."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.q(x))


# ------------------------------------------------------------------------------------- attribution


def test_rows_of_a_small_model():
    ledger = explain(mlp(), torch.randn(T, D))
    assert [(r.bytes, r.shape, r.dtype, r.layer, r.kind, r.operator) for r in ledger.rows] == [
        (4 * T * D, (T, D), "float32", "0", "Linear", "addmm"),
        (4 * T * H, (T, H), "float32", "1", "ReLU", "relu"),
    ]
    assert [(h.layer, h.operator) for h in ledger.rows[1].holders] == [
        ("1", "relu"),
        ("2", "addmm"),
    ]
    assert ledger.total_bytes == 4 * T * (D + H)
    assert ledger.by_layer_kind() == {"ReLU": 4 * T * H, "Linear": 4 * T * D}
    assert ledger.by_operator() == {"relu": 4 * T * H, "addmm": 4 * T * D}


@pytest.mark.parametrize("kind", KINDS)
def test_the_fake_ledger_is_the_real_one(kind: str):
    make, batch = MODELS[kind]
    model = make().train()
    ledger, real = (explain(model, batch(0), on=on) for on in ("fake", "real"))  # type: ignore[arg-type]
    assert ledger.rows == real.rows
    with saved_bytes(model) as count:
        model(**batch(0))
    assert ledger.total_bytes == count()
    assert sum(ledger.by_layer_kind().values()) == ledger.total_bytes
    assert sum(ledger.by_operator().values()) == ledger.total_bytes


def test_who_shares_what_in_a_llama():
    rows = explain(llama(), token_batch()).rows
    (shared,) = (r for r in rows if r.layer == "model.layers.1.self_attn.q_proj")
    attention = "model.layers.1.self_attn"
    assert [(h.layer, h.operator) for h in shared.holders] == [
        (f"{attention}.{name}", "mm") for name in ("q_proj", "k_proj", "v_proj")
    ]
    output = next(r for r in rows if any(h.layer == f"{attention}.o_proj" for h in r.holders))
    assert (output.layer, output.kind) == (attention, "LlamaAttention")
    assert output.operator == "ScaledDotProductFlashAttentionForCpu"


class Square(Function):
    """Looks at gradients inside of its forward, and has attributes named like a node's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.name = "mine"
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (inner.sigmoid() * inner).sum()  # dropped: holds nothing in the end
        ctx.save_for_backward(x.clone())
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


@pytest.mark.parametrize("on", ["fake", "real"])
def test_functions_written_in_python(on: Any):
    rows = explain(Calls(Square.apply), torch.randn(T, D), on=on).rows
    assert [(r.layer, r.operator, r.bytes) for r in rows] == [
        ("layer", "addmm", 4 * T * D),
        ("", "Square", 4 * T * D),
    ]


@pytest.mark.parametrize("on", ["fake", "real"])
def test_what_autograd_let_go_of_is_not_held(on: Any):
    def drops(x: Tensor) -> Tensor:
        x.sigmoid().mul(x).sum()
        return x

    assert explain(Calls(drops), torch.randn(T, D), on=on).by_operator() == {"addmm": 4 * T * D}


@pytest.mark.parametrize("on", ["fake", "real"])
def test_checkpointing_keeps_its_inputs_alone(on: Any):
    rows = explain(Checkpointed(), torch.randn(T, D), on=on).rows
    assert [(r.layer, r.operator) for r in rows] == [("first", "addmm"), ("", "checkpoint")]
    assert sum(r.bytes for r in rows) == 2 * 4 * T * D


def test_a_loss_outside_of_the_model():
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    batch = (torch.randn(T, D), torch.randn(T, O))
    rows = explain(mlp(), batch, loss=loss).rows
    assert [(r.layer, r.operator) for r in rows[2:]] == [("(outside)", "MseLoss")] * 2


def test_labels_count_the_loss():
    ids = token_batch()["input_ids"]
    rows = explain(llama(), {"input_ids": ids, "labels": ids}).rows
    assert [r.operator for r in rows if r.kind == "LlamaForCausalLM"] == [
        "LogSoftmax",
        "NllLoss",
        "NllLoss",
    ]


@pytest.mark.parametrize("gradient", ["factored", "dense"])
@pytest.mark.parametrize("init", ["average", "random", "svd"])
def test_a_compressed_model(init: Any, gradient: Any):
    model = velora_torch.compress(llama(), VeloraConfig(num_groups=G, init=init, gradient=gradient))
    ledger, real = (explain(model, token_batch(), on=on) for on in ("fake", "real"))  # type: ignore[arg-type]
    assert ledger.rows == real.rows
    kept = [r for r in ledger.rows if r.operator == "FactoredLinear"]
    assert {(r.kind, r.shape) for r in kept} == {("Linear", (14, G))}
    assert len(kept) == 2 * 7


def test_a_recomputing_model():
    model = recompute(llama()).train()
    batch = token_batch() | {"labels": token_batch()["input_ids"]}
    ledger, real = (explain(model, batch, on=on) for on in ("fake", "real"))  # type: ignore[arg-type]
    assert ledger.rows == real.rows
    assert ledger.by_layer_kind()["LlamaRMSNorm"] == 5 * 14 * 32 * 4  # their inputs alone
    with saved_bytes(model) as count:
        model(**batch)
    assert ledger.total_bytes == count()


# ------------------------------------------------------------------------- the model is left alone


@pytest.mark.parametrize("on", ["fake", "real"])
def test_nothing_is_changed(on: Any):
    model = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.Dropout(), nn.Linear(H, O)).eval()
    velora_torch.compress(model, CONFIG)
    grad = torch.ones_like(model[0].coef)
    model[0].coef.grad = grad
    before = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    state = torch.get_rng_state()
    with torch.no_grad():
        assert "NativeBatchNorm" in explain(model, torch.randn(T, D), on=on).by_operator()
    torch.randn(T, D)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(T, D), torch.randn(T, D)  # the batch, and what was drawn behind it
    assert torch.equal(after, torch.get_rng_state())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]), name
    assert not any(m.training for m in model.modules())
    assert not model[0].velora.drawn
    assert model[0].coef.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))


def test_no_weights_are_needed():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**20, 2**20), nn.Sigmoid())  # 4 TiB
        batch = torch.empty(2**10, 2**20)
    ledger = explain(model, batch)
    assert ledger.total_bytes == 2 * 4 * 2**30
    assert ledger.what_if(num_groups=1).total_bytes == 4 * 2**30 + 4 * 2**10


def test_a_fake_model_is_not_changed_either():
    world = FakeWorld()
    model = world.model(blocks())
    ledger = explain(model, world.batch(torch.randn(T, D)))
    assert ledger.rows == explain(blocks(), torch.randn(T, D)).rows
    assert ledger.what_if(num_groups=G).freed_bytes
    assert all(p.requires_grad for p in model.parameters())


def test_a_ledger_is_of_the_model_as_it_was():
    model, x = blocks(), torch.randn(T, D)
    ledger = explain(model, x)
    expected = ledger.what_if(num_groups=G).total_bytes
    velora_torch.compress(model, CONFIG)
    assert ledger.what_if(num_groups=G).total_bytes == expected == explain(model, x).total_bytes


# ----------------------------------------------------------------------------------------- what if

ONE = 4 * T * D  # an input
Z = 4 * T * G


@pytest.mark.parametrize(
    ("targets", "layers", "freed", "useless"),
    [
        (["v"], 2, 0, "v"),
        (["k", "v"], 4, 0, "kv"),
        (["q", "k", "v"], 6, 2 * ONE, ""),
        (["v", "down"], 4, 2 * ONE, "v"),
        (["down"], 2, 2 * ONE, ""),
        ("all-linear", 8, 4 * ONE, ""),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("on", ["fake", "real"])
def test_what_if(targets: Any, layers: int, freed: int, useless: str, on: Any):
    ledger = explain(blocks(), torch.randn(T, D), on=on)
    found = ledger.what_if(targets, num_groups=G)
    assert len(found.layers) == layers
    assert (found.freed_bytes, found.added_bytes) == (freed, layers * Z)
    assert found.total_bytes == ledger.total_bytes - freed + layers * Z
    assert set(found.useless) == {f"{block}.{name}" for block in range(2) for name in useless}
    if "v" in useless:
        others = [f"{name} (mm)" for name in "qk" if name not in targets]
        assert found.useless["1.v"] == f"its input is also kept by {', '.join(others)}"


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "down_proj"], ["o_proj"]])
def test_what_is_freed_is_what_nobody_else_holds(targets: Any):
    ledger = explain(llama(), token_batch())
    found = ledger.what_if(targets, num_groups=G)
    chosen = set(found.layers)
    gone = [r for r in ledger.rows if all(h.layer in chosen for h in r.holders)]
    assert found.freed_bytes == sum(r.bytes for r in gone)


def test_attention_keeps_its_output():
    found = explain(llama(), token_batch()).what_if(["o_proj"], num_groups=G)
    assert found.freed_bytes == 0
    reason = "its input is also kept by LlamaAttention (ScaledDotProductFlashAttentionForCpu)"
    assert list(found.useless.values()) == [reason] * 2


def test_a_layer_that_the_batch_does_not_reach():
    found = explain(Half(), torch.randn(T, D)).what_if(["v"], num_groups=G)
    assert found.useless == {"v": "it keeps no input: this batch does not train it"}


def test_a_compressed_model_is_no_start():
    ledger = explain(velora_torch.compress(mlp(), CONFIG), torch.randn(T, D))
    with pytest.raises(ValueError, match="compressed already: explain the plain model"):
        ledger.what_if()


def test_unknown_layers():
    with pytest.raises(ValueError, match=r"'downn' matches no layer; nearest: down"):
        explain(blocks(), torch.randn(T, D)).what_if(["downn"])


# ------------------------------------------------------------------------------------ how it looks


def test_equal_rows_of_blocks_are_counted():
    ledger = explain(blocks(), torch.randn(T, D))
    lines = str(ledger).splitlines()
    assert (
        lines[0]
        == "7.81 KiB saved for the backward pass in 10 tensors, without parameters and buffers"
    )
    shared = next(line for line in lines if "*.q (mm)" in line)
    assert " ".join(shared.split()) == (
        "2.50 KiB 2 x 1.25 KiB 20 x 16 float32 *.q (mm) k (mm), v (mm)"
    )


def test_what_if_as_text():
    ledger = explain(blocks(), torch.randn(T, D))
    first, *rest = str(ledger.what_if(["v", "down"], num_groups=G)).splitlines()
    assert first.startswith("4 layers compressed: ")
    assert "(freed 2.50 KiB, added 1.25 KiB)" in first
    assert rest == [
        "2 of them free nothing:",
        "     2 x v: its input is also kept by q (mm), k (mm)",
    ]


def test_json():
    ledger = explain(blocks(), torch.randn(T, D))
    whole = json.loads(json.dumps(ledger.to_dict()))
    assert whole["total_bytes"] == ledger.total_bytes == sum(r["bytes"] for r in whole["rows"])
    assert whole["rows"][3]["holders"] == [
        {"layer": f"0.{name}", "operator": "mm"} for name in ("q", "k", "v")
    ]
    found = ledger.what_if(["v"], num_groups=G)
    assert json.loads(json.dumps(found.to_dict()))["useless"] == found.useless


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"y": torch.ones(T, D)}, r"forward of Block: .*Its parameters are x"),
        ((torch.ones(T, D), torch.ones(T, D)), r"forward of Block: too many positional"),
        ([torch.ones(T, D)], "one tensor, got list"),
        (torch.ones(T, D + 1), "Block fails on fake tensors: .*normalized_shape"),
    ],
    ids=["name", "count", "list", "shape"],
)
def test_a_batch_that_does_not_fit(batch: Any, message: str):
    with pytest.raises(ValueError, match=message):
        explain(Block(), batch)


@torch.library.custom_op("velora_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


STRAY = torch.ones(D)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * float(x.sum()), "aten._local_scalar_dense.default.*have none: .*on='real'"),
        (lambda x: x[x > 0], r"aten.nonzero.default.*on='real'"),
        (lambda x: doubled(x), "velora_test::doubled.*on='real'"),
        (lambda x: x * STRAY, "neither a parameter nor a buffer"),
    ],
    ids=["item", "nonzero", "no-fake", "stray-tensor"],
)
def test_what_fake_tensors_cannot_do(function: Any, message: str):
    with pytest.raises(ValueError, match=message):
        explain(Calls(function), torch.ones(T, D))


def test_a_real_copy_can():
    model = Calls(lambda x: x * float(x.sum().detach()))
    assert explain(model, torch.ones(T, D), on="real").by_operator() == {"addmm": 4 * T * D}


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (mlp().requires_grad_(False), None, "no gradient flows"),
        (Calls(lambda x: "text"), None, "a str, has neither a loss nor"),
        (mlp(), lambda model, batch: model(batch), r"0-d tensor, got shape \(20, 8\)"),
        (mlp(), lambda model, batch: 1.0, "0-d tensor, got 1.0"),
    ],
    ids=["frozen", "no-output", "loss-shape", "loss-type"],
)
def test_no_loss(model: nn.Module, loss: Any, message: str):
    with pytest.raises(ValueError, match=message):
        explain(model, torch.ones(T, D), loss=loss)


def test_where_it_runs():
    with pytest.raises(ValueError, match="'fake' or 'real', got 'cuda'"):
        explain(mlp(), torch.ones(T, D), on="cuda")  # type: ignore[arg-type]
