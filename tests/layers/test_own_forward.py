"""Subclasses of nn.Linear with a forward of their own: exact, compressed, or left with a reason."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from velora_torch import VeloraConfig, compress, fold, restore, summary
from velora_torch.memory.count import saved_bytes
from velora_torch.model import compressed_layers

from ..closeness import TOLERANCE, assert_bitwise, assert_close

FEATURES, OUTPUTS = 16, 16


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return super().forward(x) * factor


class Functional(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        assert self.weight.dtype == input.dtype
        return torch.relu(F.linear(input, weight=self.weight, bias=self.bias))


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight.t()) + F.linear(x + 1, self.weight)


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class HalfUsed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:4])


class Penalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight.square().mean()


class NotTransposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Demanding(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class Silent(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x


PLAIN = (Transposed, Scaled, Functional, Twice)
OTHERS = (Normalised, HalfUsed, Penalised, NotTransposed, Demanding, Silent)


def model(kind: type[nn.Linear], bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, FEATURES), kind(FEATURES, OUTPUTS, bias=bias))


def batch(seed: int = 0) -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)) + 0.5


def rebuilt(layer: Any) -> Callable[[Tensor], Tensor]:
    """What the layer's input looks like from its kept numbers: every sub-token along v."""

    def rebuild(x: Tensor) -> Tensor:
        groups = x.unflatten(-1, layer.velora_vectors.shape)
        z = (groups * layer.velora_vectors).sum(-1, keepdim=True)
        return (z * layer.velora_vectors).flatten(-2)

    return rebuild


@pytest.mark.parametrize("gradient", ["factored", "dense"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", PLAIN)
def test_the_forward_stays_its_own_and_its_input_is_not_kept(
    kind: type[nn.Linear], bias: bool, gradient: Any
) -> None:
    plain = model(kind, bias)
    config = VeloraConfig(targets=["1"], num_groups=4, gradient=gradient)
    compressed = compress(copy.deepcopy(plain), config)
    assert list(summary(compressed).compressed) == ["1"]
    kept, outputs = [], []
    for either in (plain, compressed):
        with saved_bytes(either) as count:
            outputs.append(either(batch()))
        kept.append(count())
        outputs[-1].sum().backward()
    assert_bitwise(outputs[1], outputs[0])
    assert kept[1] < kept[0]
    for there, here in zip(plain[0].parameters(), compressed[0].parameters(), strict=True):
        assert torch.equal(there.grad, here.grad)


@pytest.mark.parametrize("kind", [Transposed, Scaled, Functional])
def test_the_gradient_is_that_of_the_rebuilt_input(kind: type[nn.Linear]) -> None:
    plain = model(kind)
    compressed = compress(copy.deepcopy(plain), VeloraConfig(targets=["1"], num_groups=4))
    compressed(batch()).square().sum().backward()
    layer = compressed[1]
    x = plain[0](batch()).detach()
    y = kind.forward(plain[1], x)
    dY = torch.autograd.grad(y.square().sum(), y)[0].detach()
    # The derivative of the same forward in its weight, with the input as it was rebuilt.
    if kind is Functional:
        dY = dY * (y > 0)
    factor = 2.0 if kind is Scaled else 1.0
    dW = factor * dY.flatten(0, 1).t() @ rebuilt(layer)(x).flatten(0, 1)
    folded = (layer.coef.grad[..., None] * layer.velora_vectors).flatten(1)
    assert_close(folded, dW, TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("every", [1, None], ids=["folded", "pending"])
def test_steps_move_the_weight_and_restore_gives_the_class_back(
    kind: type[nn.Linear], every: int | None
) -> None:
    plain = model(kind)
    config = VeloraConfig(num_groups=4, fold_every=every)
    compressed = compress(copy.deepcopy(plain), config).train()
    optimizer = torch.optim.Adam(compressed.parameters(), lr=0.01)
    for seed in range(3):
        compressed(batch(seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        before = compressed(batch(9))
        with saved_bytes(compressed) as count, torch.enable_grad():
            here = compressed(batch(9))
        kept = count()
        with saved_bytes(plain) as count, torch.enable_grad():
            plain(batch(9))
        assert kept < count()
        restore(fold(compressed))
        after = compressed(batch(9))
    assert type(compressed[1]) is kind
    assert not compressed_layers(compressed)
    assert not torch.equal(compressed[1].weight, plain[1].weight)
    assert_close(before, after, TOLERANCE[torch.float32])
    assert_close(here, after, TOLERANCE[torch.float32])


def test_other_arguments_reach_the_forward() -> None:
    plain = model(Scaled)[1]
    compressed = compress(copy.deepcopy(plain), VeloraConfig(num_groups=4))
    x = torch.randn(3, FEATURES)
    assert_bitwise(compressed(x, factor=3.0), plain(x, factor=3.0))
    assert_bitwise(compressed(x, 5.0), plain(x, 5.0))


@pytest.mark.parametrize("kind", OTHERS)
def test_forwards_that_do_something_else_with_the_weight_stay_exact(kind: type[nn.Linear]) -> None:
    made = compress(model(kind), VeloraConfig(num_groups=4))
    assert list(summary(made).compressed) == ["0"]
    assert summary(made).exact["1"] == f"{kind.__name__} brings a forward of its own"


def test_looking_at_a_layer_does_not_change_it() -> None:
    class Counting(Transposed):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(F.dropout(x))

    made = model(Counting)
    state = torch.get_rng_state()
    summary(made)
    assert "calls" not in made[1].__dict__
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", PLAIN)
def test_layers_without_numbers_are_recognised(kind: type[nn.Linear]) -> None:
    with torch.device("meta"):
        on_meta = compress(model(kind), VeloraConfig(num_groups=4))
    with FakeTensorMode():
        fake = compress(model(kind), VeloraConfig(num_groups=4)).train()
        fake(torch.randn(2, 5, 8)).sum().backward()
    for made in (on_meta, fake):
        assert list(summary(made).compressed) == ["0", "1"]
    assert fake[1].coef.grad.shape == (OUTPUTS, 4)


def test_checkpointing_and_copies() -> None:
    made = compress(model(Transposed), VeloraConfig(num_groups=4)).train()
    made(batch()).sum().backward()
    expected = made[1].coef.grad
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        other.zero_grad()
        checkpoint(other, batch().requires_grad_(), use_reentrant=False).sum().backward()
        assert_close(other[1].coef.grad, expected, TOLERANCE[torch.float32])
