"""A session's numbers, worked out by hand; what comes back, and what counts as finished."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

from tests.bench.speed import tiny
from velora_torch.bench.speed import session as session_room
from velora_torch.bench.speed.goals import GOALS, Goal
from velora_torch.bench.speed.rows import against, current, finished, make_rows, read_rows
from velora_torch.bench.speed.session import WARMUPS, run_case
from velora_torch.bench.speed.variants import FULL, variants_of
from velora_torch.bench.store import append_line

NAMES = ["plain", "factored"]
HERE = {
    "threads": 2,
    "machine": {"cpu": "a CPU", "cores": 2, "device": "cpu"},
    "versions": {"torch": "9.9"},
}
VARIANTS = [variant for variant in FULL if variant.name in NAMES]


def session(date="2026-01-01T00:00:00+00:00", case=tiny.LAYER, **seconds):
    given = seconds or {"plain": [1.0, 2.0, 4.0], "factored": [0.5, 1.8, 2.4]}
    around = {**HERE, "session": date}
    flops = {name: 300 if name == "plain" else 210 for name in given}
    return make_rows(case, given, flops, around, "velora bench speed")


# ------------------------------------------------------------------ a session


def test_variants_take_turns_after_warm_ups(capsys):
    clock = tiny.Clock()
    outcome = run_case(tiny.LAYER, VARIANTS, 3, print, "typed", clock, clock.prepare)
    assert clock.prepared == NAMES
    a, b = NAMES
    assert clock.ran == [a] * WARMUPS + [b] * WARMUPS + [a, b] + [a, b, b, a, a, b]
    plain, factored = outcome.rows
    assert plain.seconds == [4.0, 5.0, 6.0]
    assert factored.seconds == pytest.approx([2.8, 3.5, 4.2])
    assert (plain.ratio, plain.flops_ratio) == (1.0, 1.0)
    assert factored.ratio == pytest.approx(0.7)
    assert (factored.flops, factored.flops_ratio, factored.base) == (70, 0.7, "plain")
    assert (plain.saved_activations, factored.saved_activations) == (4096, 1024)
    assert factored.command == "typed"
    assert {"cpu", "cores"} <= factored.machine.keys()
    assert "torch" in factored.versions
    assert factored.threads >= 1


def test_a_variant_that_fails_leaves_the_others_theirs():
    error = RuntimeError("no C compiler\nand more")
    clock = tiny.Clock({"factored+compile": error}, bad=("dense",))
    outcome = run_case(tiny.LAYER, variants_of(tiny.LAYER), 2, print, "", clock, clock.prepare)
    assert outcome.failed == {
        "factored+compile": "RuntimeError: no C compiler",
        "dense": "its numbers are not finite",
    }
    assert [row.variant for row in outcome.rows] == [
        "plain",
        "plain+compile",
        "reconstruct",
        "factored",
    ]


def test_a_variant_that_is_compiled_again_while_it_is_timed_has_no_row(monkeypatch):
    """The others have theirs, the compiled ones too."""
    clock = tiny.Clock()
    monkeypatch.setattr(
        session_room, "graphs_made", lambda: min(clock.ran.count("factored+compile"), WARMUPS + 2)
    )
    outcome = run_case(tiny.LAYER, variants_of(tiny.LAYER), 2, print, "", clock, clock.prepare)
    assert outcome.failed == {"factored+compile": "it was compiled again in a timed round"}
    assert [row.variant for row in outcome.rows] == [
        "plain",
        "plain+compile",
        "reconstruct",
        "dense",
        "factored",
    ]


@pytest.mark.parametrize("how", [{"fail": {"plain": ValueError("no")}}, {"bad": ("plain",)}])
def test_without_its_base_a_case_has_no_rows(how):
    clock = tiny.Clock(**how)
    outcome = run_case(tiny.LAYER, VARIANTS, 2, print, "", clock, clock.prepare)
    assert outcome.rows == []
    assert list(outcome.failed) == ["plain"]


# ------------------------------------------------------------------ rows


def test_numbers_of_a_row():
    plain, factored = session()
    assert (plain.median, plain.low, plain.high) == (2.0, 1.0, 4.0)
    assert (plain.lower_quartile, plain.upper_quartile, plain.rounds) == (1.5, 3.0, 3)
    # 0.5, 0.9, 0.6 in the three rounds: the ratio of the medians, 0.9, would be another
    assert factored.ratio == pytest.approx(0.6)
    assert factored.ratio_lower == pytest.approx(0.55)
    assert factored.ratio_upper == pytest.approx(0.75)
    assert factored.flops_ratio == 0.7
    assert factored.settings["case"] == dict(tiny.LAYER.settings)
    assert factored.settings["variant"]["velora"] == {}


def test_lines_come_back(tmp_path):
    path, rows = tmp_path / "rows.jsonl", session()
    for row in rows:
        append_line(path, dataclasses.asdict(row))
    assert read_rows(path) == rows
    assert len(path.read_text().splitlines()) == 2
    path.write_text(json.dumps({"case": "layer"}) + "\n")
    with pytest.raises(ValueError, match="line 1 is not a row of `velora bench speed`"):
        read_rows(path)


def test_a_line_from_before_activations_were_counted_is_a_row(tmp_path):
    path, (row, _) = tmp_path / "rows.jsonl", session()
    line = dataclasses.asdict(row)
    del line["saved_activations"]
    append_line(path, line)
    assert read_rows(path) == [row]
    append_line(path, {**line, "colour": "red"})
    with pytest.raises(ValueError, match="line 2 is not a row"):
        read_rows(path)


def test_a_case_is_finished_with_all_its_variants_in_one_session():
    rows = session()
    assert list(finished(rows, tiny.LAYER, NAMES, 3)) == NAMES
    assert not finished(rows, tiny.LAYER, NAMES, 4)
    assert not finished(rows, tiny.LAYER, [*NAMES, "dense"], 3)
    assert not finished(rows, tiny.MODEL, NAMES, 3)
    halves = [rows[0], session(date="2027")[1]]
    assert not finished(halves, tiny.LAYER, NAMES, 3)


def test_rows_of_other_surroundings_do_not_finish_a_case():
    rows = session()
    assert list(finished(rows, tiny.LAYER, NAMES, 3, HERE)) == NAMES
    for other in (
        {"threads": 1},
        {"machine": {**HERE["machine"], "cpu": "another"}},
        {"machine": {**HERE["machine"], "instructions": "AVX2"}},
        {"versions": {"torch": "9.10"}},
    ):
        assert not finished(rows, tiny.LAYER, NAMES, 3, {**HERE, **other})


def test_rows_of_a_case_that_has_changed_do_not_count():
    settings = {**tiny.LAYER.settings, "tokens": 1}
    changed = dataclasses.replace(tiny.LAYER, settings=settings)
    assert current(session(), changed) == []
    assert current(session(case=changed), changed) != []


def test_ratios_are_of_the_newest_session_that_has_both():
    rows = [*session(date="2026"), *session(date="2027", plain=[9.0])]
    measured = against(rows, "factored", "plain")
    assert measured is not None
    assert measured.median == pytest.approx(0.6)
    assert against(rows, "factored", "dense") is None


def test_goals_name_variants_that_their_cases_have():
    from velora_torch.bench.speed.cases import CASES

    cases = {case.name: case for case in CASES}
    for goal in GOALS:
        known = [variant.name for variant in variants_of(cases[goal.case])]
        assert {goal.variant, goal.base} <= set(known)
    goal = Goal("layer", "factored", "plain", 0.6)
    measured = goal.measured({"layer": session()})
    assert measured is not None
    assert measured.median == pytest.approx(0.6)
    assert goal.measured({}) is None
