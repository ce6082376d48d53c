"""Cross-entropy of an output head in chunks of rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_torch
from velora_torch import VeloraConfig
from velora_torch.recomputation import left_alone, loss, recompute, recomputed
from velora_torch.recomputation.deferred import Deferred

from .cases import build, kept

T, D, V = 11, 6, 19


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "MIN_ROWS", 2)


class Head(nn.Module):
    """As much of a transformers model as is looked at."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(D, D), nn.Linear(D, V, bias=bias)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.body(x))


def pair(
    bias: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Head, Head, Tensor, Tensor]:
    torch.manual_seed(0)
    plain = Head(bias).to(dtype)
    ours = recompute(copy.deepcopy(plain))
    assert recomputed(ours) == {"lm_head": "chunked loss"}
    labels = torch.randint(V, (T,))
    labels[3:5] = -100
    return ours, plain, torch.randn(T, D).to(dtype), labels


def check(
    ours: Head, plain: Head, x: Tensor, compute: Callable[[Tensor], Tensor], **tolerance: float
) -> None:
    results = []
    for model in (ours, plain):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        value = compute(model(leaf))
        value.backward()
        parameters = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([value.detach(), leaf.grad, *parameters])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **({"rtol": 1e-12, "atol": 1e-13} | tolerance))


SETTINGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "ignored": {"ignore_index": 7},
    "smoothed": {"label_smoothing": 0.2},
    "weighted": {"weight": torch.linspace(0.1, 2, V, dtype=torch.float64)},
    "everything": {
        "weight": torch.linspace(0.1, 2, V, dtype=torch.float64),
        "label_smoothing": 0.1,
        "ignore_index": 2,
    },
}


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, bias: bool):
    ours, plain, x, labels = pair(bias)
    if "ignore_index" in SETTINGS[name]:
        labels = labels.clamp_min(2)
    check(ours, plain, x, lambda logits: F.cross_entropy(logits, labels, **SETTINGS[name]) * 3)


def test_without_reduction():
    ours, plain, x, labels = pair()
    factors = torch.linspace(-1, 1, T, dtype=torch.float64)
    check(ours, plain, x, lambda y: (F.cross_entropy(y, labels, reduction="none") * factors).sum())


def test_everything_ignored():
    ours, _, x, labels = pair()
    ignored = torch.full_like(labels, -100)
    assert F.cross_entropy(ours(x), ignored).isnan()
    assert F.cross_entropy(ours(x), ignored, reduction="sum") == 0


def test_no_rows():
    ours, _, x, labels = pair()
    value = F.cross_entropy(ours(x[:0]), labels[:0], reduction="sum")
    value.backward()
    assert value == 0
    assert not ours.lm_head.weight.grad.any()


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float": lambda y, t: F.cross_entropy(y.float().view(-1, V), t),
    "to": lambda y, t: F.cross_entropy(y.to(torch.float32).to(torch.float64).view(-1, V), t),
    "shift": lambda y, t: F.cross_entropy(
        y.view(1, T, V)[..., :-1, :].contiguous().view(-1, V), t[1:]
    ),
    "shift-2": lambda y, t: F.cross_entropy(y.view(1, T, V)[:, 1:].reshape(-1, V), t[:-1]),
    "inferred": lambda y, t: F.cross_entropy(y.reshape(1, T, V).view(T, -1), t),
    "one-item": lambda y, t: F.cross_entropy(y.view(1, T, V)[0], t),
    "flatten": lambda y, t: nn.CrossEntropyLoss()(y.view(1, T, V).flatten(0, 1), t),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_the_loss_are_deferred(way: str, monkeypatch: pytest.MonkeyPatch):
    ours, plain, x, labels = pair()
    check(ours, plain, x, lambda y: WAYS[way](y, labels), rtol=1e-5, atol=1e-7)

    def fail(self: Deferred) -> Tensor:
        raise AssertionError("the logits were computed as a whole")

    monkeypatch.setattr(Deferred, "value", fail)
    WAYS[way](ours(x), labels).backward()


OTHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softcap": lambda y, t: F.cross_entropy(torch.tanh(y / 30) * 30, t),
    "scaled": lambda y, t: F.cross_entropy(y * 0.5, t),
    "columns": lambda y, t: F.cross_entropy(y[:, :10], t.clamp(-100, 9)),
    "one-row": lambda y, t: y[0].square().sum(),
    "classes-first": lambda y, t: F.cross_entropy(y.view(1, T, V).transpose(1, 2), t.view(1, T)),
    "probabilities": lambda y, t: F.cross_entropy(y, torch.full_like(y, 1 / V)),
    "in-place": lambda y, t: F.cross_entropy(y.mul_(2).view(-1, V), t),
    "view-in-place": lambda y, t: F.cross_entropy(y, t) + y[1:].mul_(2).sum() + y.sum(),
    "z-loss": lambda y, t: F.cross_entropy(y, t) + y.logsumexp(-1).square().mean(),
    "masked": lambda y, t: F.cross_entropy(y[t >= 0], t[t >= 0]),
}


@pytest.mark.parametrize("way", OTHER)
def test_other_uses_get_the_logits(way: str):
    ours, plain, x, labels = pair()
    check(ours, plain, x, lambda y: OTHER[way](y, labels))


def test_rows_are_cut_into_chunks():
    for rows, classes, features in [(11, 19, 6), (1, 5, 9), (0, 5, 3), (4096, 32000, 64)]:
        parts = list(loss.chunks(rows, classes, features))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
        size = max(part.stop - part.start for part in parts)
        assert size * classes <= max(2 * classes, rows * features + classes)


def test_only_the_hidden_states_are_kept():
    ours, _, x, labels = pair()
    own = [*ours.parameters(), labels, x]
    counted = kept(lambda: F.cross_entropy(ours(x).float(), labels), own)
    assert dict(counted) == {("float64", T * D): 1}


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_frozen_parts(frozen: str):
    ours, plain, x, labels = pair(bias=True)
    for model in (ours, plain):
        (model.lm_head if frozen == "head" else model.body).requires_grad_(False)
    check(ours, plain, x, lambda y: F.cross_entropy(y, labels))


def test_double_backward():
    ours, plain, x, labels = pair(bias=True)
    results = []
    for model in (ours, plain):
        leaf = x.clone().requires_grad_()
        value = F.cross_entropy(model(leaf), labels)
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        first.square().sum().backward()
        results.append([leaf.grad, model.lm_head.weight.grad, model.body.weight.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_backward_twice():
    ours, _, x, labels = pair()
    value = F.cross_entropy(ours(x), labels)
    value.backward(retain_graph=True)
    once = ours.lm_head.weight.grad.clone()
    value.backward()
    torch.testing.assert_close(ours.lm_head.weight.grad, 2 * once)


def test_bf16_is_no_worse_than_the_whole():
    """Both against float64: logits in bfloat16, loss in float32."""
    torch.manual_seed(0)
    rows, features, classes = 400, 32, 300
    h, weight = torch.randn(rows, features), torch.randn(classes, features)
    labels = torch.randint(classes, (rows,))
    wrapper = Head()
    errors = []
    exact = _head_gradient(h.bfloat16().double(), weight.bfloat16().double(), labels, None)
    for used in (None, wrapper):
        found = _head_gradient(h.bfloat16(), weight.bfloat16(), labels, used)
        errors.append(
            [((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]
        )
    for whole, chunked in zip(*errors, strict=True):
        assert chunked < 1.2 * whole + 1e-7


def _head_gradient(h: Tensor, weight: Tensor, labels: Tensor, wrapper: Any) -> list[Tensor]:
    head = nn.Linear(*reversed(weight.shape), bias=False, dtype=h.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
    if wrapper is not None:
        wrapper.lm_head = head
        recompute(wrapper)
    leaf = h.clone().requires_grad_()
    logits = head(leaf)
    wide = logits if h.dtype == torch.float64 else logits.float()
    value = F.cross_entropy(wide, labels)
    assert value.dtype == wide.dtype
    value.backward()
    assert head.weight.grad is not None
    assert leaf.grad is not None
    return [t.detach().double() for t in (value, leaf.grad, head.weight.grad)]


def test_logits_of_a_model():
    """A language model's output in training is good for metrics, before and after backward."""
    model, batch = build("llama", torch.float32)
    expected = model(**batch).logits
    recompute(model)
    outputs = model(**batch)
    logits = outputs.logits
    assert isinstance(logits, Deferred)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    outputs.loss.backward()
    assert torch.equal(logits.detach().cpu(), expected)
    assert logits.detach().numpy().shape == expected.shape
    assert logits.tolist() == expected.tolist()
    assert repr(logits).startswith("tensor(")
    assert torch.equal(outputs[1], expected)


def test_logits_after_the_step_are_an_error():
    """They would be those of other weights."""
    model, batch = build("llama", torch.float32)
    outputs = recompute(model)(**batch)
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match=r"before\s+the optimizer's step"):
        outputs.logits.argmax(-1)


def test_accelerate_converts_outputs():
    operations = pytest.importorskip("accelerate.utils.operations")
    model, batch = build("llama", torch.bfloat16)
    outputs = operations.convert_to_fp32(recompute(model)(**batch))
    assert outputs.logits.dtype == torch.float32
    outputs.loss.backward()


def test_left_alone():
    model = Head()
    assert recomputed(recompute(model.eval())) == {"lm_head": "chunked loss"}
    assert type(model(torch.randn(2, D))) is Tensor  # not in training

    compressed = Head()
    velora_torch.compress(compressed, VeloraConfig(targets=["lm_head"], num_groups=2))
    assert recomputed(recompute(compressed)) == {}
    assert "CompressedLinear" in left_alone(compressed)["lm_head"]

    replaced = Head()
    replaced.lm_head.forward = lambda x: x  # type: ignore[method-assign]
    assert recomputed(recompute(replaced)) == {}
    assert "replaced" in left_alone(replaced)["lm_head"]

    assert "not asked for" in left_alone(recompute(Head(), loss=False))["lm_head"]


def test_a_fused_loss_of_somebody_else_is_respected():
    """As Liger's: its forward uses the weight, and never calls the head."""

    class Fused(Head):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.body(x), self.lm_head.weight).logsumexp(-1).sum()

    torch.manual_seed(0)
    model = Fused()
    x = torch.randn(3, D)
    model(x).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    recompute(model)(x).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_trainer(tmp_path: Any):
    transformers = pytest.importorskip("transformers")
    weights = []
    for applied in (False, True):
        model, batch = build("llama", torch.float32)
        if applied:
            recompute(model)
        rows = [{k: v[i] for k, v in batch.items()} for i in (0, 1)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            seed=0,
        )
        transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows).train()
        weights.append(model.model.layers[0].mlp.gate_proj.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)
