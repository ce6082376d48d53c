"""Steps take turns, the first place rotates, and ratios are taken round by round."""

from __future__ import annotations

import gc

import pytest

from velora_torch.bench.interleave import Spread, interleave, ratios, rotated, spread


class Machine:
    """Time that only steps pass; the first of a round takes ten times as long."""

    def __init__(self, cost):
        self.now, self.cost, self.ran = 0.0, cost, []

    def clock(self):
        return self.now

    def steps(self):
        return [lambda name=name: self.step(name) for name in self.cost]

    def step(self, name):
        first = len(self.ran) % len(self.cost) == 0
        self.ran.append(name)
        self.now += self.cost[name] * (10 if first else 1)


def test_the_first_place_rotates_and_warm_ups_do_not_count():
    machine, said = Machine({"a": 1.0, "b": 2.0, "c": 3.0}), []
    seconds = interleave(machine.steps(), 4, 2, machine.clock, said.append)
    assert "".join(machine.ran) == "abc" * 2 + "abc" + "bca" + "cab" + "abc"
    assert seconds == [[10.0, 1.0, 1.0, 10.0], [2.0, 20.0, 2.0, 2.0], [3.0, 3.0, 30.0, 3.0]]
    assert said == [1, 2, 3, 4]


def test_the_price_of_being_first_is_not_in_the_medians():
    machine = Machine({"a": 1.0, "b": 2.0, "c": 3.0})
    seconds = interleave(machine.steps(), 6, clock=machine.clock)
    assert [spread(one).median for one in seconds] == [1.0, 2.0, 3.0]
    assert spread(ratios(seconds[1], seconds[0])).median == 2.0


def test_a_slow_round_slows_both_and_leaves_the_ratio():
    assert ratios([1.0, 10.0, 2.0], [2.0, 20.0, 4.0]) == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="2 rounds cannot be compared with 1"):
        ratios([1.0, 2.0], [1.0])


def test_spread():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 1.0, 2.0, 4.0, 5.0)
    assert spread([1.0, 2.0]) == Spread(1.5, 1.0, 1.25, 1.75, 2.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0)


def test_rotated():
    assert [rotated(3, by) for by in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


def test_no_garbage_is_collected_within_a_round_even_if_a_step_fails():
    seen = []
    interleave([lambda: seen.append(gc.isenabled())], 1)
    assert seen == [False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave([lambda: 1 // 0], 1)  # type: ignore[list-item, return-value]
    assert gc.isenabled()
