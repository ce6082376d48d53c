"""Each choice of v against a computation with loops, and inputs that have no direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from velora_torch.subtoken import vectors as choose

from ..closeness import assert_bitwise, assert_close

SIZES = [
    pytest.param(12, 4, 3, id="divisible"),
    pytest.param(10, 4, 3, id="last-group-cut"),
    pytest.param(10, 6, 2, id="group-all-padding"),
    pytest.param(5, 5, 1, id="G-is-D"),
    pytest.param(5, 1, 5, id="one-group"),
]
PER_GROUP = [pytest.param(False, id="shared"), pytest.param(True, id="per-group")]
CPU = torch.device("cpu")


def sub_tokens(x_TD: Tensor, groups: int, size: int) -> Tensor:
    """(T, G, M), zero where no feature is."""
    out = torch.zeros(len(x_TD), groups, size, dtype=torch.float64)
    for d in range(x_TD.shape[1]):
        out[:, d // size, d % size] = x_TD[:, d]
    return out


def cut(raw_GM: Tensor, features: int) -> Tensor:
    """Unit rows over real features; zero rows where a group has none."""
    out = raw_GM.double().clone()
    for g in range(out.shape[0]):
        for m in range(out.shape[1]):
            if g * out.shape[1] + m >= features:
                out[g, m] = 0
        if out[g].any():
            out[g] /= out[g].norm()
    return out


def average(x_TD: Tensor, groups: int, size: int, per_group: bool) -> Tensor:
    """Mean of the sub-tokens; a feature that does not exist is in no mean."""
    mean = sub_tokens(x_TD.double(), groups, size).mean(0)
    if not per_group:
        holders = [[g for g in range(groups) if g * size + m < x_TD.shape[1]] for m in range(size)]
        shared = [
            sum(mean[g, m].item() for g in held) / len(held) for m, held in enumerate(holders)
        ]
        mean = torch.tensor(shared, dtype=torch.float64).expand(groups, size)
    return mean


def drawn(x_TD: Tensor, groups: int, size: int, per_group: bool) -> tuple[Tensor, Tensor]:
    """Vectors of the mean, as a layer draws them."""
    mask = choose.feature_mask(groups, size, x_TD.shape[1], CPU)
    raw = choose.mean_sub_token(x_TD, groups, size, torch.float64)
    if not per_group:
        raw = choose.share(raw, mask)
    return choose.normalise(raw, mask, choose.uniform(mask, torch.float64))


def assert_unit(v_GM: Tensor, features: int) -> None:
    size = v_GM.shape[1]
    for g, row in enumerate(v_GM):
        real = g * size < features
        assert row.norm().item() == pytest.approx(1.0 if real else 0.0, rel=1e-5)
        assert not row[max(features - g * size, 0) :].any(), "a feature that does not exist"


@pytest.mark.parametrize("per_group", PER_GROUP)
@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_average(features: int, groups: int, size: int, per_group: bool):
    x = torch.randn(7, features, dtype=torch.float64)
    v_GM, valid = drawn(x, groups, size, per_group)
    assert_close(v_GM, cut(average(x, groups, size, per_group), features), 1e-12)
    assert_unit(v_GM, features)
    assert valid


@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_uniform(features: int, groups: int, size: int):
    mask = choose.feature_mask(groups, size, features, CPU)
    v_GM = choose.uniform(mask, torch.float64)
    assert_close(v_GM, cut(torch.ones(groups, size), features), 1e-12)
    assert_unit(v_GM, features)


@pytest.mark.parametrize("per_group", PER_GROUP)
@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_svd(features: int, groups: int, size: int, per_group: bool):
    x = torch.randn(50, features, dtype=torch.float64) + 0.3
    v_GM = choose.singular(x, groups, size, per_group, torch.float64)
    tokens = sub_tokens(x, groups, size)
    for g in range(groups):
        rows = tokens[:, g] if per_group else tokens.reshape(-1, size)
        if not rows.any():
            assert not v_GM[g].any()
            continue
        first = torch.linalg.svd(rows).Vh[0]
        assert abs(torch.dot(first, v_GM[g]).item()) == pytest.approx(1, rel=1e-9)
        assert torch.dot(rows.mean(0), v_GM[g]) >= 0


@pytest.mark.parametrize("per_group", PER_GROUP)
def test_svd_looks_at_a_sub_sample(per_group: bool, monkeypatch):
    monkeypatch.setattr(choose, "SVD_SAMPLE", 12)
    x = torch.randn(100, 6, dtype=torch.float64)
    rows = x[::9] if per_group else x[::17]  # ceil(100 / 12), ceil(100 * 2 / 12)
    got = choose.singular(x, 2, 3, per_group, torch.float64)
    monkeypatch.undo()
    assert_bitwise(got, choose.singular(rows, 2, 3, per_group, torch.float64))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("per_group", PER_GROUP)
@pytest.mark.parametrize("init", ["average", "svd"])
def test_tiny_and_huge_inputs_give_the_same_vectors(init: str, scale: float, per_group: bool):
    x = torch.randn(20, 10) + 0.5
    mask = choose.feature_mask(4, 3, 10, CPU)
    otherwise = choose.uniform(mask, torch.float32)

    def draw(x: Tensor) -> Tensor:
        if init == "svd":
            raw = choose.singular(x, 4, 3, per_group, torch.float32)
        else:
            raw = choose.mean_sub_token(x, 4, 3, torch.float32)
            raw = raw if per_group else choose.share(raw, mask)
        return choose.normalise(raw, mask, otherwise)[0]

    assert_close(draw(x * scale), draw(x), 1e-4)
    assert_unit(draw(x * scale), 10)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("per_group", PER_GROUP)
@pytest.mark.parametrize("init", ["average", "svd"])
def test_a_batch_without_direction_keeps_the_old_vectors(init: str, value: float, per_group: bool):
    x = torch.full((20, 10), value)
    mask = choose.feature_mask(4, 3, 10, CPU)
    old = choose.normalise(torch.randn(4, 3), mask, choose.uniform(mask, torch.float32))[0]
    if init == "svd":
        raw = choose.singular(x, 4, 3, per_group, torch.float32)
    else:
        raw = choose.mean_sub_token(x, 4, 3, torch.float32)
        raw = raw if per_group else choose.share(raw, mask)
    new, valid = choose.normalise(raw, mask, old)
    assert_bitwise(new, old)
    assert not valid


def test_a_group_that_is_always_zero_does_not_spoil_the_others():
    x = torch.randn(20, 12, dtype=torch.float64)
    x[:, 3:6] = 0
    v_GM, valid = drawn(x, 4, 3, per_group=True)
    expected = cut(average(x, 4, 3, True), 12)
    expected[1] = 3**-0.5
    assert_close(v_GM, expected, 1e-12)
    assert valid


@pytest.mark.parametrize("per_group", PER_GROUP)
def test_random_is_given_by_seed_name_and_draw(per_group: bool):
    mask = choose.feature_mask(4, 3, 10, CPU)

    def draw(name: str = "a", seed: int = 0, count: int = 0) -> Tensor:
        return choose.random(
            name, seed, count, tuple(mask.shape), per_group, torch.float32, "random"
        )

    assert_bitwise(draw(), draw())
    others = [draw("b"), draw(seed=1), draw(count=1)]
    assert all(not torch.equal(draw(), other) for other in others)
    assert all(torch.equal(row, draw()[0]) for row in draw()) != per_group


def test_seeds_of_layers_do_not_collide():
    seeds = {
        choose.layer_seed(f"model.layers.{layer}.mlp.down_proj", seed, counter)
        for layer in range(20)
        for seed in range(20)
        for counter in range(-20, 20)
    }
    assert len(seeds) == 20 * 20 * 40
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.mark.parametrize(("features", "groups", "size"), SIZES)
def test_cosine_projects_a_dense_moment(features: int, groups: int, size: int):
    mask = choose.feature_mask(groups, size, features, CPU)
    otherwise = choose.uniform(mask, torch.float64)
    old = choose.normalise(torch.randn(groups, size), mask, otherwise)[0]
    new = choose.normalise(torch.randn(groups, size), mask, otherwise)[0]
    turn = choose.cosine(old, new)
    sign_turn = choose.sign_cosine(old, new)
    for g in range(groups):
        if g * size >= features:
            continue
        assert turn[g].item() == pytest.approx(torch.dot(old[g], new[g]).item(), rel=1e-12)
        # Least squares: the multiple of sign(new) that is nearest to sign(old).
        best = torch.linalg.lstsq(new[g].sign()[:, None], old[g].sign()[:, None]).solution
        assert sign_turn[g].item() == pytest.approx(best.item(), abs=1e-12)
