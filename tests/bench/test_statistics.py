"""Means, standard errors and verdicts against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("pydantic")

from velora_torch.bench.statistics import (
    Estimate,
    average,
    average_over,
    difference,
    estimate,
    shared_tasks,
    verdict,
)

BASE = {"a": {0: 0.80, 1: 0.84, 2: 0.82}, "b": {0: 0.50, 1: 0.60, 2: 0.70}}
OWN = {"a": {0: 0.81, 1: 0.86, 2: 0.85}, "b": {0: 0.49, 1: 0.60, 2: 0.71}}


def close(value):
    return pytest.approx(value, rel=1e-12)


def test_mean_and_standard_error():
    # 1, 2, 3: s = 1, n = 3
    assert estimate([1.0, 2.0, 3.0]) == Estimate(2.0, close(1 / math.sqrt(3)))
    assert estimate([0.7]) == Estimate(0.7, None)
    assert estimate([]) is None


def test_average_over_tasks():
    # a: 0.82, s = 0.02; b: 0.60, s = 0.10; errors s/sqrt(3); average 0.71
    expected = math.sqrt(0.02**2 + 0.10**2) / math.sqrt(3) / 2
    assert average_over(BASE, ["a", "b"]) == Estimate(close(0.71), close(expected))


def test_an_average_lacks_an_error_where_one_task_does_and_is_none_where_one_is_missing():
    assert average([Estimate(1.0, 0.5), Estimate(2.0)]) == Estimate(1.5, None)
    assert average([Estimate(1.0, 0.5), None]) is None
    assert average([]) is None


def test_difference_is_paired_by_task_and_seed():
    # a: 0.01, 0.02, 0.03: mean 0.02, s = 0.01; b: -0.01, 0, 0.01: mean 0, s = 0.01
    expected = math.sqrt(2 * 0.01**2 / 3) / 2
    assert difference(OWN, BASE, ["a", "b"]) == Estimate(close(0.01), close(expected))


def test_seeds_that_one_side_lacks_do_not_count():
    own = {"a": {0: 0.9, 1: 0.9, 7: 0.0}}
    base = {"a": {0: 0.8, 1: 0.6, 9: 1.0}}
    assert difference(own, base, ["a"]) == Estimate(close(0.2), close(0.1))
    assert difference(own, {"a": {5: 1.0}}, ["a"]) is None


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (Estimate(0.01, 0.005), "yes"),
        (Estimate(-0.005, 0.005), "yes"),
        (Estimate(-0.0051, 0.005), "no"),
        (Estimate(0.1, None), "one seed"),
        (Estimate(-0.1, None), "one seed"),
        (None, "-"),
    ],
    ids=["better", "just within", "just outside", "one seed, better", "one seed, worse", "missing"],
)
def test_verdict(gap, expected):
    assert verdict(gap) == expected


def test_shared_tasks_are_those_of_all_variants():
    assert shared_tasks({"x": BASE, "y": {"b": {0: 1.0}}}, ["a", "b", "c"]) == ["b"]
