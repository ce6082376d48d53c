"""Similarities before and after projection, on sub-tokens whose angles are known."""

from __future__ import annotations

import math

import pytest
import torch

from velora_torch.analysis import similarity
from velora_torch.analysis.measures import project


def at_angles(angles: torch.Tensor, size: int = 2) -> torch.Tensor:
    """Sub-tokens of one group at these angles to the first axis, (T, 1, M)."""
    x_TGM = torch.zeros(len(angles), 1, size, dtype=torch.float64)
    x_TGM[:, 0, 0], x_TGM[:, 0, 1] = angles.cos(), angles.sin()
    return x_TGM


def along_first(size: int) -> torch.Tensor:
    v_GM = torch.zeros(1, size, dtype=torch.float64)
    v_GM[0, 0] = 1
    return v_GM


def measured(x_TGM, v_GM):
    pairs = similarity.draw_pairs(x_TGM, 0)
    return similarity.change(x_TGM, project(x_TGM, v_GM), pairs)


def at(curve: list[float], k: float) -> float:
    return curve[similarity.THRESHOLDS.index(k)]


def test_the_prediction_is_the_tail_of_a_normal_distribution():
    # sqrt(k) = sigma: outside of one standard deviation; 1.96 of them: 5%.
    assert similarity.predicted(0.25, 0.5) == pytest.approx(0.3173, abs=1e-4)
    assert similarity.predicted(1.959964**2 * 0.01, 0.1) == pytest.approx(0.05, abs=1e-6)
    assert similarity.predicted(0, 0.5) == 1
    assert similarity.predicted(0, 0) == 1
    assert similarity.predicted(0.1, 0) == 0


def test_the_prediction_against_drawn_angles():
    sigma = 0.3
    theta = sigma * torch.randn(200_000, dtype=torch.float64)
    for k in (0.01, 0.05, 0.1, 0.3):
        drawn = float((theta.square() >= k).double().mean())
        assert similarity.predicted(k, sigma) == pytest.approx(drawn, abs=0.005)


def test_small_normal_angles_come_out_as_predicted():
    x_TGM = at_angles(0.3 * torch.randn(20_000, dtype=torch.float64))
    change = measured(x_TGM, along_first(2))
    assert change.spread == pytest.approx(0.3, rel=0.02)
    # A sub-token with itself: sin² θ instead of θ², so a little less.
    for k in (0.05, 0.1, 0.2):
        assert at(change.single_K, k) == pytest.approx(at(change.predicted_K, k), abs=0.02)
    # Two sub-tokens at independent angles: less again, and |θ_1 θ_2| >= k as drawn.
    theta = 0.3 * torch.randn(2, 200_000, dtype=torch.float64)
    product = (theta[0].sin() * theta[1].sin()).abs()
    for k in (0.05, 0.1, 0.2):
        drawn = float((product >= k).double().mean())
        assert at(change.pairs_K, k) == pytest.approx(drawn, abs=0.02)
        assert at(change.pairs_K, k) < at(change.single_K, k)


def test_sub_tokens_along_the_vector_keep_their_similarity():
    change = measured(at_angles(torch.tensor([0.0, math.pi, 0.0, math.pi])), along_first(2))
    assert change.spread == pytest.approx(0, abs=1e-7)
    assert change.mean == pytest.approx(0, abs=1e-12)
    assert change.pairs_K[1:] == [0.0] * 20
    assert change.gap == 0


def test_orthogonal_sub_tokens_lose_all_of_it():
    change = measured(at_angles(torch.full((4,), math.pi / 2)), along_first(2))
    assert change.spread == pytest.approx(math.pi / 2)
    assert change.mean == pytest.approx(1)
    assert change.pairs_K == change.single_K == [1.0] * 21


def test_a_change_is_that_of_the_cosines():
    angles = torch.tensor([0.2, 0.9], dtype=torch.float64)
    x_TGM = torch.tensor([[[5.0]], [[0.1]]]) * at_angles(angles)  # lengths do not matter
    change = measured(x_TGM, along_first(2))
    before, after = math.cos(0.7), math.cos(0.2) * math.cos(0.9)
    assert change.mean == pytest.approx(abs(before - after))
    assert change.spread == pytest.approx(math.sqrt((0.2**2 + 0.9**2) / 2))


def test_pairs_are_of_two_tokens_in_one_group_and_seeded():
    x_TGM = torch.randn(5, 3, 4)
    pairs = similarity.draw_pairs(x_TGM, 1)
    assert (pairs.first_P != pairs.second_P).all()
    assert (pairs.first_P % 3 == pairs.second_P % 3).all()
    assert len(pairs.first_P.unique()) == 15
    assert torch.equal(pairs.first_P, similarity.draw_pairs(x_TGM, 1).first_P)
    assert not torch.equal(pairs.first_P, similarity.draw_pairs(x_TGM, 2).first_P)


def test_sub_tokens_of_zeros_are_in_no_pair_and_have_no_angle():
    x_TGM = at_angles(torch.tensor([0.4, 0.4, 0.4], dtype=torch.float64))
    x_TGM[1] = 0
    pairs = similarity.draw_pairs(x_TGM, 0)
    assert 1 not in {*pairs.first_P.tolist(), *pairs.second_P.tolist()}
    assert measured(x_TGM, along_first(2)).spread == pytest.approx(0.4)


def test_one_token_has_no_pairs():
    change = measured(at_angles(torch.tensor([0.4])), along_first(2))
    assert math.isnan(change.mean)
    assert change.spread == pytest.approx(0.4)
