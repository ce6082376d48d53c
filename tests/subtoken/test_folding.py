"""Folding against the reference, and rounding that is unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from velora_torch.sharding import Block
from velora_torch.subtoken import folding, reference
from velora_torch.subtoken.folding import fold_

from ..closeness import assert_bitwise, assert_close

HALVES = [
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, id="float16"),
]
DTYPES = [
    pytest.param(torch.float64, id="float64"),
    pytest.param(torch.float32, id="float32"),
    *HALVES,
]
SHAPES = [
    pytest.param(5, 12, 4, id="divisible"),
    pytest.param(5, 10, 4, id="last-group-cut"),
    pytest.param(5, 10, 6, id="group-all-padding"),
    pytest.param(1, 7, 7, id="one-output-G-is-D"),
    pytest.param(3, 1, 1, id="one-feature"),
    pytest.param(0, 6, 2, id="no-outputs"),
]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [1.0, 0.9, "tensor"])
@pytest.mark.parametrize("transposed", [False, True], ids=["OD", "DO-view"])
@pytest.mark.parametrize(("outputs", "features", "groups"), SHAPES)
def test_fold_is_the_reference(
    dtype: torch.dtype,
    decay: float | str,
    transposed: bool,
    outputs: int,
    features: int,
    groups: int,
):
    size = -(-features // groups)
    stored = torch.randn((features, outputs) if transposed else (outputs, features)).to(dtype)
    weight = stored.t() if transposed else stored
    coef = torch.randn(outputs, groups, dtype=wide(dtype))
    e = torch.randn(groups, size, dtype=wide(dtype))
    factor = torch.tensor(0.75) if decay == "tensor" else decay
    number = float(factor)
    expected = weight.to(wide(dtype)) * number + reference.expand(coef, e, features)

    fold_(weight, coef, e, factor)
    if dtype in (torch.float16, torch.bfloat16):
        assert_bitwise(weight, expected.to(dtype))
    else:
        assert_close(weight, expected, 1e-14 if dtype == torch.float64 else 1e-6)
    changed = stored.t() if transposed else stored
    assert changed.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])
def test_chunks_do_not_show(dtype: torch.dtype, seed: int | None, monkeypatch):
    weight = torch.randn(17, 10).to(dtype)
    coef, e = torch.randn(17, 5, dtype=wide(dtype)), torch.randn(5, 2, dtype=wide(dtype))
    whole, parts = weight.clone(), weight.clone()
    fold_(whole, coef, e, 0.9, seed)
    monkeypatch.setitem(folding.CHUNK, "cpu", 30)
    fold_(parts, coef, e, 0.9, seed)
    assert_bitwise(parts, whole)


# ------------------------------------------------------------------ stochastic rounding

NORMAL = [0.3, -0.3, 1 + 2.0**-14, 1 - 2.0**-15, -1 - 2.0**-13, 1.0, -2.0, 1000.3, 2047.9, 0.0]
TINY = [3.3 * 2.0**-24, -0.4 * 2.0**-24, 2.0**-24, 2.0**-14 - 2.0**-26, -(2.0**-14), 6.1e-5]


def values(dtype: torch.dtype) -> Tensor:
    return torch.tensor(NORMAL + (TINY if dtype == torch.float16 else [1e-30, -3e38, 3.3e-39]))


def neighbours(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two numbers of ``dtype`` around each value, lower first (equal where it is one)."""
    near = value.to(dtype)
    bits = near.view(torch.int16)
    away = (near.double().abs() < value.double().abs()).to(torch.int16)
    other = (bits + 2 * away - 1).view(dtype)
    other = torch.where(near.double() == value.double(), near, other)
    return torch.minimum(near, other), torch.maximum(near, other)


def rounded(value: Tensor, dtype: torch.dtype, seed: int, rows: int = 1) -> Tensor:
    """Values folded into zero weights: (rows, values)."""
    weight = torch.zeros(rows, len(value), dtype=dtype)
    fold_(weight, value.expand(rows, -1), torch.ones(len(value), 1), 1.0, seed)
    return weight


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_gives_a_neighbour_and_is_unbiased(dtype: torch.dtype):
    value = values(dtype)
    low, high = neighbours(value, dtype)
    draws = torch.cat([rounded(value, dtype, seed) for seed in range(2500)])
    assert ((draws == low) | (draws == high)).all()
    step = (high.double() - low.double()).clamp(min=1e-45)
    odds = ((value.double() - low.double()) / step).clamp(0, 1)
    got = (draws.double() - low.double()).mean(0) / step
    error = 4.5 * (odds * (1 - odds) / len(draws)).sqrt() + 2.0**-16
    assert ((got - odds).abs() <= error).all(), (got - odds, error)


@pytest.mark.parametrize("dtype", HALVES)
def test_errors_average_out_over_one_matrix(dtype: torch.dtype):
    """Noise from O + D numbers must be as good as O * D independent ones."""
    value = torch.full((256,), 1 + 0.3 * torch.finfo(dtype).eps)
    matrix = rounded(value, dtype, seed=5, rows=256).double()
    ups = (matrix > 1).double()
    standard_error = math.sqrt(0.3 * 0.7 / matrix.numel())
    assert abs(ups.mean().item() - 0.3) < 5 * standard_error


@pytest.mark.parametrize("dtype", HALVES)
def test_what_the_type_holds_stays(dtype: torch.dtype):
    weight = torch.cat([torch.randn(64) * 10.0**k for k in range(-8, 4)]).to(dtype).view(8, -1)
    powers = torch.tensor([2.0**k for k in range(-24, 15)] * 2).to(dtype).view(2, -1)
    for before in (weight, powers, -powers):
        for seed in range(20):
            after = before.clone()
            fold_(after, torch.zeros(len(before), 1), torch.ones(1, before.shape[1]), 1.0, seed)
            assert_bitwise(after, before)


@pytest.mark.parametrize("dtype", HALVES)
def test_infinities_and_nan_stay(dtype: torch.dtype):
    # The last is the NaN that CUDA's arithmetic gives: all ones.
    cuda_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    special = torch.tensor([math.inf, -math.inf, math.nan, -math.nan])
    value = torch.cat([special, cuda_nan])
    for seed in range(50):
        got = rounded(value, dtype, seed)[0]
        assert got[:2].tolist() == [math.inf, -math.inf]
        assert got[2:].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_and_infinities_of_the_weight_stay(dtype: torch.dtype):
    """All NaN, those whose bits are all ones included: noise must not carry out of them."""
    ones = torch.tensor([0x7FFF, -1], dtype=torch.int16).view(dtype)
    special = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    before = torch.cat([special, ones]).expand(4, -1)
    decay = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]
    for seed in range(50):
        for factor, coef in ((1.0, 0.0), (0.99, 0.5), (decay, 0.5)):
            after = before.clone()
            fold_(after, torch.full((4, 1), coef), torch.ones(1, 5), factor, seed)
            assert after[:, 2:].isnan().all()
            if not isinstance(factor, torch.Tensor):
                assert_bitwise(after[:, :2], before[:, :2])


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_repeats_for_a_seed_and_differs_between_seeds(dtype: torch.dtype):
    value = torch.randn(300)
    assert_bitwise(rounded(value, dtype, 1), rounded(value, dtype, 1))
    assert not torch.equal(rounded(value, dtype, 1), rounded(value, dtype, 2))


@pytest.mark.parametrize("dtype", HALVES)
def test_small_updates_are_kept_on_average(dtype: torch.dtype):
    """1000 updates of 1/100 of the resolution: nearest rounding loses all of them."""
    update = torch.finfo(dtype).eps / 100
    for seed, expected in ((None, 0.0), (0, 1000 * update)):
        weight = torch.ones(40, 40, dtype=dtype)
        for step in range(1000):
            coef = torch.full((40, 1), update)
            fold_(weight, coef, torch.ones(1, 40), 1.0, None if seed is None else step)
        moved = weight.double().mean().item() - 1
        assert moved == pytest.approx(expected, rel=0.05)


def test_full_precision_weights_are_not_rounded():
    weight = torch.randn(4, 6)
    again = weight.clone()
    coef, e = torch.randn(4, 3), torch.randn(3, 2)
    fold_(weight, coef, e, 1.0, stochastic_seed=1)
    fold_(again, coef, e, 1.0, stochastic_seed=None)
    assert_bitwise(weight, again)


def test_noise_is_uniform_and_pairwise_uncorrelated():
    seeds = 4000
    noise = torch.stack(
        [
            folding._Noise(Block(0, 0, 3, 4), torch.Size((3, 4)), seed, torch.device("cpu")).rows(
                0, 3
            )
            for seed in range(seeds)
        ]
    )
    assert noise.min() >= 0
    assert noise.max() < 1 << 16
    quarter = noise >> 14  # (seeds, O, D) in 0..3
    expected = seeds / 4
    for o in range(3):
        for d in range(4):
            counts = quarter[:, o, d].bincount(minlength=4).double()
            assert (
                (counts - expected).square() / expected
            ).sum() < 21  # chi-square, 3 d.o.f., 1e-4
    first = quarter[:, 0, 0]
    for o, d in [(0, 1), (1, 0), (1, 1), (2, 3)]:  # same row, same column, neither
        pairs = (4 * first + quarter[:, o, d]).bincount(minlength=16).double()
        assert ((pairs - seeds / 16).square() / (seeds / 16)).sum() < 45  # 15 d.o.f., 1e-4
    flat = noise.double().flatten(1)
    correlation = torch.corrcoef(flat.T).fill_diagonal_(0)
    assert correlation.abs().max() < 4.5 / math.sqrt(seeds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 7), slice(6, 7), slice(7, 7)])
def test_a_block_of_rows_gets_the_bits_of_the_whole_fold(rows, dtype):
    """As a rank folds its shard, stochastic rounding included."""
    torch.manual_seed(0)
    weight, coef, e = torch.randn(7, 12).to(dtype), torch.randn(7, 4) / 9, torch.randn(4, 3)
    whole, part = weight.clone(), weight[rows].clone()
    fold_(whole, coef, e, 0.9, stochastic_seed=5)
    fold_(part, coef[rows], e, 0.9, stochastic_seed=5, block=Block(rows.start, 0, 7, 12))
    assert_bitwise(part, whole[rows])
