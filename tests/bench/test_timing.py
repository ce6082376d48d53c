"""Steps are timed in turn, and only times of one session are compared."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("pydantic")

from tests.bench import fakes
from velora_torch.bench.grid import cells
from velora_torch.bench.timing import (
    current,
    newest_with,
    read_times,
    time_variants,
    write_times,
)

SECONDS = {"full": [4.0, 2.0, 3.0], "full+velora": [1.0, 1.5, 2.0], "probe": [0.5, 0.5, 0.5]}


def timed_cells(seed=0):
    made = cells(fakes.make_bench(), "local", ["b"], list(SECONDS), seed + 1)
    return [cell for cell in made if cell.seed == seed]


class Clock:
    """Time that only steps pass."""

    def __init__(self):
        self.now, self.steps = 0.0, []

    def __call__(self):
        return self.now

    def make_step(self, cell):
        left = iter([100.0, *SECONDS[cell.variant]])  # the first is the warm-up

        def step():
            self.steps.append(cell.variant)
            self.now += next(left)

        return step


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def times(clock):
    return time_variants(
        timed_cells(), clock.make_step, lambda line: None, "velora bench", 3, clock
    )


def test_steps_are_interleaved_and_take_turns_in_being_first(times, clock):
    a, b, c = SECONDS
    warm_up = [a, b, c]
    assert clock.steps == [*warm_up, a, b, c, b, c, a, c, a, b]


def test_median_spread_and_ratio_leave_the_warm_up_out(times):
    numbers = {t.variant: (t.median, t.low, t.high, t.ratio, t.rounds) for t in times}
    assert numbers == {
        "full": (3.0, 2.0, 4.0, 1.0, 3),
        "full+velora": (1.5, 1.0, 2.0, 0.5, 3),
        "probe": (0.5, 0.5, 0.5, 0.5 / 3, 3),
    }


def test_lines_come_back(times, tmp_path):
    path = tmp_path / "times.jsonl"
    write_times(path, times)
    assert read_times(path) == times
    path.write_text('{"median": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not the time"):
        read_times(path)


def test_a_ratio_is_of_one_session(times):
    later = [
        dataclasses.replace(t, session="9999", median=99.0) for t in times if t.variant == "full"
    ]
    both = newest_with([*times, *later], ["full", "full+velora"])
    assert [t.median for t in both.values()] == [3.0, 1.5]
    assert newest_with([*times, *later], ["full"])["full"].median == 99.0
    assert newest_with(times, ["full", "ssf"]) == {}


def test_times_of_former_recipes_do_not_count(times):
    former = dataclasses.replace(times[0], fingerprint="former")
    assert current([former, *times], timed_cells()) == times
