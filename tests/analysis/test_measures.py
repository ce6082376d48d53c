"""Measures of matrices whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from velora_torch.analysis import measures
from velora_torch.subtoken import reference
from velora_torch.subtoken import vectors as choose


def unit(*entries: float) -> torch.Tensor:
    v = torch.tensor(entries, dtype=torch.float64)
    return v / v.norm()


def projected(x_TD, v_GM):
    x_TGM = measures.grouped(x_TD, *v_GM.shape)
    return x_TGM, measures.project(x_TGM, v_GM)


# ------------------------------------------------------------------ stable rank


def test_a_matrix_of_rank_one_has_stable_rank_one():
    a = torch.outer(torch.randn(50), torch.randn(7))
    assert measures.stable_rank(a) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (20, 6), (6, 20)])
def test_equal_singular_values_give_the_full_rank(shape):
    a = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64)).Q
    a = {(6, 6): torch.eye(6), (20, 6): a, (6, 20): a.T}[shape]
    assert measures.stable_rank(3 * a) == pytest.approx(6)


def test_stable_rank_follows_from_the_singular_values():
    a = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0]))
    assert measures.stable_rank(a) == pytest.approx((16 + 4 + 4 + 1) / 16)


def test_isotropic_sub_tokens_have_the_rank_of_their_size():
    x = torch.randn(4000, 32, dtype=torch.float64)
    for groups in (4, 8, 16):
        ranks = measures.stable_ranks(measures.grouped(x, groups, 32 // groups))
        assert ranks.shared == pytest.approx(32 / groups, rel=0.05)
        assert ranks.per_group == pytest.approx(32 / groups, rel=0.1)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_stable_rank_does_not_depend_on_the_scale(scale):
    a = torch.randn(9, 5, dtype=torch.float64)
    assert measures.stable_rank(scale * a) == pytest.approx(measures.stable_rank(a))


@pytest.mark.parametrize("entry", [0.0, math.nan, math.inf])
def test_some_matrices_have_no_stable_rank(entry):
    assert math.isnan(measures.stable_rank(torch.full((3, 2), entry)))


def test_groups_of_one_direction_each_have_rank_one_alone_and_more_together():
    x_TGM = torch.zeros(5, 2, 3)
    x_TGM[:, 0, 0] = x_TGM[:, 1, 1] = torch.arange(1.0, 6)
    ranks = measures.stable_ranks(x_TGM)
    assert ranks.per_group == pytest.approx(1)
    assert ranks.shared == pytest.approx(2)


def test_groups_that_all_follow_one_direction_tell_no_others_apart():
    direction = torch.randn(8, 4, dtype=torch.float64)
    noise_TD = torch.randn(4000, 32, dtype=torch.float64)
    x_TD = 9 * torch.outer(torch.randn(4000, dtype=torch.float64), direction.flatten()) + noise_TD
    along = direction / direction.norm(dim=1, keepdim=True)
    across = torch.randn(8, 4, dtype=torch.float64)
    across -= (across * along).sum(dim=1, keepdim=True) * along
    across /= across.norm(dim=1, keepdim=True)
    assert measures.stable_rank(projected(x_TD, along)[1]) == pytest.approx(1, abs=0.05)
    assert measures.stable_rank(projected(x_TD, across)[1]) == pytest.approx(8, rel=0.15)


def test_groups_of_zeros_are_left_out_of_the_mean():
    x_TGM = torch.zeros(5, 2, 3)
    x_TGM[:, 0, 0] = 1
    assert measures.stable_ranks(x_TGM).per_group == pytest.approx(1)


# ------------------------------------------------------------------ energy


def test_a_vector_along_all_sub_tokens_keeps_everything():
    v = unit(1, -2, 3)
    x_TD = (torch.randn(6, 4, 1, dtype=torch.float64) * v).flatten(1)
    energy = measures.energy(*projected(x_TD, v.expand(4, 3)))
    assert energy.kept == pytest.approx(1)
    assert energy.by_group_G.tolist() == pytest.approx([1] * 4)
    assert energy.zeroed == 0


def test_an_orthogonal_vector_keeps_nothing():
    x_TD = torch.randn(6, 4, 1, dtype=torch.float64) * unit(1, 1, 0)
    energy = measures.energy(*projected(x_TD.flatten(1), unit(1, -1, 0).expand(4, 3)))
    assert energy.kept == pytest.approx(0, abs=1e-30)
    assert energy.zeroed == 1


def test_energy_is_the_squared_cosine_of_the_angle():
    angles = torch.tensor([0.3, 1.2], dtype=torch.float64)
    x_TD = torch.stack([angles.cos(), angles.sin()], dim=1)
    energy = measures.energy(*projected(x_TD, torch.tensor([[1.0, 0.0]])))
    assert energy.kept == pytest.approx(float(angles.cos().square().mean()))


def test_energy_by_group_and_sub_tokens_of_zeros():
    x_TD = torch.tensor([[3.0, 4.0, 0.0, 0.0, 1.0, 0.0]])
    v_GM = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    energy = measures.energy(*projected(x_TD, v_GM))
    assert energy.by_group_G[0] == pytest.approx(9 / 25)
    assert energy.by_group_G[1].isnan()
    assert energy.by_group_G[2] == 0
    assert energy.kept == pytest.approx(9 / 26)
    assert energy.zeroed == pytest.approx(1 / 2)


@pytest.mark.parametrize(("features", "groups", "size"), [(24, 4, 6), (23, 4, 6), (30, 5, 6)])
def test_the_best_shared_vector_keeps_the_inverse_of_the_stable_rank(features, groups, size):
    x_TD = torch.randn(40, features, dtype=torch.float64) + 0.3
    v_GM = choose.singular(x_TD, groups, size, False, torch.float64)
    x_TGM, z_TG = projected(x_TD, v_GM)
    kept = measures.energy(x_TGM, z_TG).kept
    assert kept == pytest.approx(1 / measures.stable_ranks(x_TGM).shared)


def test_a_random_vector_keeps_one_share_in_m_of_isotropic_sub_tokens():
    x_TD = torch.randn(5000, 24, dtype=torch.float64)
    v_GM = torch.nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64))
    assert measures.energy(*projected(x_TD, v_GM)).kept == pytest.approx(1 / 6, rel=0.05)


# ------------------------------------------------------------------ gradient


@pytest.mark.parametrize(("features", "groups", "size"), [(12, 3, 4), (11, 3, 4), (12, 12, 1)])
@pytest.mark.parametrize("per_group", [False, True])
def test_the_factor_tells_the_same_as_both_gradients_built(features, groups, size, per_group):
    x = torch.randn(9, features, dtype=torch.float64)
    dY = torch.randn(9, 5, dtype=torch.float64)
    mask = choose.feature_mask(groups, size, features, x.device)
    raw = choose.random("layer", 0, 0, (groups, size), per_group, torch.float64, "random")
    v, _ = choose.normalise(raw, mask, choose.uniform(mask, torch.float64))
    weight = torch.zeros(5, features, dtype=torch.float64)
    _, built, _ = reference.linear_gradients(x, weight, dY, v)
    dW = dY.T @ x

    exact = measures.exact_gradient(dY, x)
    kept = measures.gradient_kept(exact, dY, projected(x, v)[1], v)
    assert exact.norm == pytest.approx(float(dW.norm()))
    cosine = float((built * dW).sum() / built.norm() / dW.norm())
    assert kept.cosine == pytest.approx(cosine)
    error = float((dW - built).norm() / dW.norm())
    assert kept.relative_error == pytest.approx(error, abs=1e-7)
    limit = measures.NEGLIGIBLE * float(dW.square().mean().sqrt())
    assert kept.sparsity == pytest.approx(float((built.abs() < limit).double().mean()))
    assert exact.sparsity == pytest.approx(float((dW.abs() < limit).double().mean()))


def test_with_one_token_the_cosine_is_the_root_of_its_energy():
    x = torch.randn(8, 12, dtype=torch.float64)
    v = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64))
    dY = torch.zeros(8, 5, dtype=torch.float64)
    dY[2] = torch.randn(5)
    kept = measures.gradient_kept(measures.exact_gradient(dY, x), dY, projected(x, v)[1], v)
    energy = measures.energy(*projected(x[2:3], v)).kept
    assert kept.cosine == pytest.approx(math.sqrt(energy))


def test_an_orthogonal_vector_zeroes_the_gradient():
    x = (torch.randn(6, 4, 1, dtype=torch.float64) * unit(1, 1, 0)).flatten(1)
    v = unit(1, -1, 0).expand(4, 3)
    dY = torch.randn(6, 5, dtype=torch.float64)
    kept = measures.gradient_kept(measures.exact_gradient(dY, x), dY, projected(x, v)[1], v)
    assert (kept.cosine, kept.relative_error, kept.sparsity) == (0, 1, 1)


def test_a_vector_along_all_sub_tokens_keeps_the_gradient():
    v = unit(1, -2, 3).expand(4, 3)
    x = (torch.randn(6, 4, 1, dtype=torch.float64) * v[0]).flatten(1)
    dY = torch.randn(6, 5, dtype=torch.float64)
    kept = measures.gradient_kept(measures.exact_gradient(dY, x), dY, projected(x, v)[1], v)
    assert kept.cosine == pytest.approx(1)
    assert kept.relative_error == pytest.approx(0, abs=1e-6)


def test_no_gradient_has_no_cosine():
    x, dY, v = torch.randn(6, 4), torch.zeros(6, 5), unit(1, 1).expand(2, 2)
    exact = measures.exact_gradient(dY, x)
    assert math.isnan(exact.sparsity)
    kept = measures.gradient_kept(exact, dY, projected(x, v)[1], v)
    assert math.isnan(kept.cosine)
    assert math.isnan(kept.sparsity)


def test_half_of_the_gradient_is_sparse():
    x = torch.ones(3, 4)
    dY = torch.tensor([[1.0, 0.0]] * 3)
    assert measures.exact_gradient(dY, x).sparsity == 0.5
