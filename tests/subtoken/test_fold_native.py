"""Folding in C: the bits of the plain equations, and what it leaves to the operators."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from velora_torch.subtoken import folding
from velora_torch.subtoken.folding import fold_
from velora_torch.subtoken.kernels.fold import ALONE, fold_native_

from ..closeness import assert_bitwise

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
SHAPES = [
    *(pytest.param(7, 3 * size, size, id=f"M-{size}") for size in (1, 2, 4, 8, 16, 32, 5, 18)),
    pytest.param(7, 30, 8, id="last-group-cut"),
    pytest.param(7, 3, 8, id="one-group-cut"),
    pytest.param(1, 24, 8, id="one-output"),
    pytest.param(300, 256, 8, id="many"),
]


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def operands(outputs: int, features: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    groups = -(-features // size)
    return (
        torch.randn(outputs, features).to(dtype),
        torch.randn(outputs, groups) / 100,
        torch.randn(groups, size),
    )


def at_every_size(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Sums at ties and beside them, from less than the smallest number to infinity."""
    halfway = torch.tensor([0.0, 2.0**-23, 0.5, 1 - 2.0**-23])
    sixteenths = torch.arange(16) / 16
    fraction = 1 + (sixteenths[:, None] + torch.finfo(dtype).eps * halfway).flatten()
    power = 2.0 ** torch.arange(-30, 21)
    coef = (power[:, None] * torch.cat([fraction, -fraction])).flatten().unsqueeze(1)
    return torch.zeros(len(coef), 3, dtype=dtype), coef, torch.ones(1, 3)


def noise_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    numbers = torch.randint(0, 1 << 16, (sum(weight.shape),), dtype=torch.int32)
    return numbers[: len(weight)], numbers[len(weight) :]


def expected(
    weight: Tensor, coef: Tensor, e: Tensor, decay: float, noise: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The equations of fold.c: every sum exact, then rounded once."""
    product = (coef.double().unsqueeze(-1) * e.double()).flatten(1)[:, : weight.shape[1]]
    total = ((weight.float() * decay).double() + product).float()
    if weight.dtype == torch.float32 or noise is None:
        return total.to(weight.dtype)
    drawn = noise[0][:, None] ^ noise[1]
    if weight.dtype == torch.float16:  # up where the part above the lower neighbour exceeds noise
        apart = (2.0 ** (total.frexp().exponent.double() - 11)).clamp(min=2.0**-24)
        below = (total.double() / apart).floor()
        up = (total.double() / apart - below) * (1 << 16) > drawn + 0.5
        return ((below + up) * apart).to(torch.float16)
    bits = total.view(torch.int32) + drawn
    return bits.bitwise_and(-0x10000).view(torch.float32).to(torch.bfloat16)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("transposed", [False, True], ids=["OD", "DO-view"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("decay", [1.0, 0.9375])
@pytest.mark.parametrize(("outputs", "features", "size"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_is_that_of_the_equations(
    dtype: torch.dtype,
    outputs: int,
    features: int,
    size: int,
    decay: float,
    stochastic: bool,
    transposed: bool,
):
    weight, coef, e = operands(outputs, features, size, dtype)
    noise = noise_of(weight) if stochastic else None
    aim = expected(weight, coef, e, decay, noise)
    stored = weight.t().contiguous() if transposed else weight.clone()
    assert fold_native_(stored.t() if transposed else stored, coef, e, decay, noise)
    assert_bitwise(stored.t() if transposed else stored, aim)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_that_16_bits_hold_stays(dtype: torch.dtype, stochastic: bool):
    weight = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    folded = weight.clone()
    noise = noise_of(weight) if stochastic else None
    assert fold_native_(folded, torch.zeros(256, 32), torch.zeros(32, 8), 1.0, noise)
    torch.testing.assert_close(folded, weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_at_every_size(dtype: torch.dtype, stochastic: bool):
    weight, coef, e = at_every_size(dtype)
    noise = noise_of(weight) if stochastic else None
    aim = expected(weight, coef, e, 1.0, noise)
    assert fold_native_(weight, coef, e, 1.0, noise)
    assert_bitwise(weight, aim)


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_give_the_same(dtype: torch.dtype, seed: int | None, monkeypatch):
    """But for the last bit of a float32 sum, where the CPU has no fused multiply-add."""
    weight, coef, e = operands(64, 96, 8, dtype)
    native, operators = weight.clone(), weight.clone()
    fold_(native, coef, e, 0.9, seed)
    monkeypatch.setattr(folding, "fold_native_", lambda *operands: False)
    fold_(operators, coef, e, 0.9, seed)
    assert not torch.equal(native, weight)
    torch.testing.assert_close(native.float(), operators.float(), rtol=2.0**-7, atol=1e-7)
    assert (native != operators).double().mean() < (1e-3 if dtype in HALVES else 0.5)


def test_many_weights_are_shared_between_threads():
    assert ALONE < 300 * 256


def test_strided_coefficients_and_vectors():
    """Shared vectors are one row expanded; a rank's coefficients may be a slice."""
    weight, coef, _ = operands(6, 24, 8, torch.bfloat16)
    e = torch.randn(8).expand(3, 8)
    sliced = torch.stack([coef, coef], dim=-1)[..., 0]
    assert not sliced.is_contiguous()
    noise = noise_of(weight)
    aim = expected(weight, coef, e, 0.5, noise)
    assert fold_native_(weight, sliced, e, 0.5, noise)
    assert_bitwise(weight, aim)


def test_decay_may_be_a_tensor():
    weight, coef, e = operands(6, 24, 8, torch.float32)
    aim = expected(weight, coef, e, 0.75, None)
    assert fold_native_(weight, coef, e, torch.tensor(0.75), None)
    assert_bitwise(weight, aim)


def test_autograd_learns_that_the_weight_has_changed():
    weight, coef, e = operands(6, 24, 8, torch.float32)
    weight.requires_grad_()
    loss = weight.square().sum()
    with torch.no_grad():
        fold_(weight.detach(), coef, e)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("why", ["float64", "gaps", "coef", "vectors", "inference"])
def test_what_c_cannot_do_is_left_as_it_is(why: str):
    weight, coef, e = operands(6, 24, 8, torch.float32)
    if why == "float64":
        weight = weight.double()
    if why == "gaps":
        weight = torch.randn(6, 48)[:, ::2]
    if why == "coef":
        coef = coef.double()
    if why == "vectors":
        e = e.double()
    if why == "inference":
        with torch.inference_mode():
            weight = weight + 0
    before = weight.clone()
    assert not fold_native_(weight, coef, e, 0.5, None)
    assert_bitwise(weight, before)


def test_tensors_without_numbers_are_left_to_the_operators():
    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode:
            weight, coef, e = torch.empty(6, 24), torch.empty(6, 3), torch.empty(3, 8)
            assert not fold_native_(weight, coef, e, 0.5, None)
            fold_(weight, coef, e, 0.5, 1)


def test_who_counts_operators_sees_them():
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    weight, coef, e = operands(6, 24, 8, torch.float32)
    before = weight.clone()
    with Count() as count:
        assert not fold_native_(weight, coef, e, 0.5, None)
        assert torch.equal(weight, before)
        fold_(weight, coef, e, 0.5)
    assert count.seen > 1
    assert not torch.equal(weight, before)


def test_a_compiled_function_may_fold():
    weight, coef, e = operands(6, 24, 8, torch.bfloat16)
    aim = weight.clone()
    fold_(aim, coef, e, 0.5)
    torch.compile(fold_, backend="eager", fullgraph=True)(weight, coef, e, 0.5)
    assert_bitwise(weight, aim)
