"""`velora bench speed` as a user meets it, with steps that take no time; its table and plot."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

from tests.bench.speed import tiny
from tests.bench.speed.test_rows import HERE, session
from velora_torch import cli
from velora_torch.bench.command import bench
from velora_torch.bench.request import Request
from velora_torch.bench.speed.cases import CASES
from velora_torch.bench.speed.command import speed
from velora_torch.bench.speed.goals import Goal
from velora_torch.bench.speed.rows import read_rows
from velora_torch.bench.speed.session import Outcome
from velora_torch.bench.speed.table import format_flops, found_rows, markdown
from velora_torch.bench.speed.variants import BESIDE, FULL, LORA, PARTS, variants_of


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The machine that the rows of these tests are of."""
    around = dict(HERE)
    monkeypatch.setattr("velora_torch.bench.speed.command.surroundings", lambda: around)
    return around


class Runs:
    """Times cases in no time, and remembers which; some fail, one is interrupted."""

    def __init__(self, fail=(), interrupt="", broken=""):
        self.fail, self.interrupt, self.broken, self.ran = fail, interrupt, broken, []

    def __call__(self, case, variants, rounds, say):
        self.ran.append((case.name, [variant.name for variant in variants], rounds))
        if case.name == self.interrupt:
            raise KeyboardInterrupt
        if case.name == self.broken:
            raise MemoryError("too large")
        names = [v.name for v in variants if v.name not in self.fail]
        times = {name: [1.0 + place / 4] * rounds for place, name in enumerate(names)}
        date = f"2026-01-{len(self.ran):02}"
        return Outcome(session(date, case, **times), dict.fromkeys(self.fail, "no luck"))

    @property
    def cases(self):
        return [name for name, *_ in self.ran]


def go(folder, runs=None, known=tiny.CASES, **asked):
    said = []
    asked = {"rounds": 2} | asked
    code = speed(Request("speed", folder, **asked), said.append, runs or Runs(), known)
    return code, "\n".join(said)


def test_a_whole_bench(tmp_path):
    runs = Runs()
    code, said = go(tmp_path, runs)
    assert code == 0
    assert runs.cases == ["model", "layer", "layer-lora", "parts"]
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == sum(len(variants_of(case)) for case in tiny.CASES[:4])
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.jsonl",
        "table.md",
        "speed.png",
        "speed.svg",
    }
    assert "case 2/4: layer: a layer" in said
    assert "layer: plain+compile 1.25×, reconstruct 1.50×" in said
    assert (tmp_path / "table.md").read_text() in said


@pytest.mark.parametrize("slow", [(), (torch.bfloat16,)])
def test_cases_that_take_very_long_here_are_named(monkeypatch, tmp_path, slow):
    monkeypatch.setattr("velora_torch.bench.speed.command.slow_types", lambda: slow)
    code, said = go(tmp_path)
    assert code == 0
    named = "Such cases: model,layer,layer-lora,parts"
    assert (named in said) == bool(slow)


def test_a_second_call_times_nothing(tmp_path):
    go(tmp_path)
    runs = Runs()
    code, said = go(tmp_path, runs)
    assert (code, runs.ran) == (0, [])
    assert said.count("timed already") == 4


def test_more_rounds_or_another_scale_time_what_is_new(tmp_path):
    go(tmp_path, cases="layer")
    runs = Runs()
    go(tmp_path, runs, cases="layer", rounds=3)
    assert [(name, rounds) for name, _, rounds in runs.ran] == [("layer", 3)]
    runs = Runs()
    go(tmp_path, runs, scale="large")
    assert runs.cases == ["model", "layer-lora", "parts", "larger"]


def test_the_base_is_always_timed(tmp_path):
    runs = Runs()
    go(tmp_path, runs, cases="layer,layer-lora", variants="factored,dense")
    assert runs.ran == [("layer", ["plain", "dense", "factored"], 2)]


def test_cases_are_found_whatever_the_scale(tmp_path):
    runs = Runs()
    go(tmp_path, runs, cases="larger")
    assert runs.cases == ["larger"]


def test_an_interrupted_bench_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Runs(interrupt="layer-lora"))
    assert "## Single layers" in (tmp_path / "table.md").read_text()
    runs = Runs()
    go(tmp_path, runs)
    assert runs.cases == ["layer-lora", "parts"]


def test_failures_are_told_at_the_end_and_timed_again(tmp_path):
    code, said = go(tmp_path, Runs(fail=("factored+compile",)), cases="layer")
    assert code == 1
    assert "failed: layer, factored+compile: no luck" in said
    runs = Runs(broken="layer")
    code, said = go(tmp_path, runs, cases="layer,parts")
    assert code == 1
    assert runs.cases == ["layer", "parts"]
    assert "failed: layer, all variants: MemoryError: too large" in said


def test_what_another_machine_has_timed_is_timed_again(tmp_path, here):
    go(tmp_path, cases="layer", variants="factored")
    here["threads"] = 8
    _, said = go(tmp_path, cases="layer", variants="factored", list_only=True)
    assert (
        "open, plain, factored; with another CPU, torch or number of threads factored 1.25×" in said
    )
    runs = Runs()
    go(tmp_path, runs, cases="layer", variants="factored")
    assert runs.cases == ["layer"]


def test_list_runs_nothing(tmp_path):
    go(tmp_path, cases="layer", variants="factored")
    runs = Runs()
    code, said = go(tmp_path, runs, list_only=True, variants="factored")
    assert (code, runs.ran) == (0, [])
    assert said.splitlines() == [
        "1/2  model (a model): open, plain, factored",
        "2/2  layer (a layer): finished, factored 1.25× of plain",
    ]


def test_a_table_of_nothing(tmp_path):
    code, said = go(tmp_path, table_only=True)
    assert code == 1
    assert "no finished case yet" in said


def test_table_only_shows_all_cases(tmp_path):
    go(tmp_path)
    (tmp_path / "table.md").unlink()
    code, said = go(tmp_path, table_only=True, cases="layer")
    assert code == 0
    assert "## model: a model" in said


def test_rows_of_former_cases_are_told_and_left_out(tmp_path):
    go(tmp_path, cases="layer,parts")
    settings = {**tiny.LAYER.settings, "tokens": 1}
    changed = [dataclasses.replace(tiny.LAYER, settings=settings), tiny.PARTS]
    code, said = go(tmp_path, known=changed, table_only=True)
    assert code == 0
    assert f"{len(variants_of(tiny.LAYER))} rows of former cases" in said
    assert "## Single layers" not in said
    runs = Runs()
    go(tmp_path, runs, known=changed)
    assert runs.cases == ["layer"]


# ------------------------------------------------------------------ the table


def table(*sessions, cases=tiny.CASES):
    rows = [row for rows in sessions for row in rows]
    return markdown(found_rows(rows, cases), cases, "speed.png")


def test_a_model_has_a_line_for_each_variant():
    rows = session(case=tiny.MODEL)
    rows[0].saved_activations = 3 << 20
    text = table(rows)
    assert "## model: a model" in text
    plain = "| plain | 2.00 s | 1.00 s to 4.00 s | 1.00× | 1.00 to 1.00 |  | 300 | 1.00× | 150 |"
    own = "| 1.80 s | 500 ms to 2.40 s | 0.60× | 0.55 to 0.75 |  | 210 | 0.70× | 117 | - |"
    assert f"{plain} 3.00 MiB |" in text
    assert f"| ours, factored {own}" in text
    assert "dense" not in text
    assert "Command: `velora bench speed`, 2026-01-01 to 2026-01-01, 11.7 s in all." in text
    assert "Machine: a CPU, 2 cores. torch 9.9." in text


def test_a_variant_is_compared_with_others_than_the_first():
    seconds = {"plain": [1.0], "factored": [0.8], "factored-operators": [1.6]}
    compiled = {"plain+compile": [0.4], "factored+compile": [0.6]}
    text = table(session(case=tiny.MODEL, **seconds, **compiled))
    assert "| 0.80 to 0.80 | 0.50× (0.50 to 0.50) over ours, factored, without C |" in text
    both = "1.50× (1.50 to 1.50) over plain, compiled; 0.75× (0.75 to 0.75) over ours, factored"
    assert f"| 0.60 to 0.60 | {both} |" in text
    assert "over plain + GC" not in text


def test_variants_beside_each_other_are_of_the_same_cases():
    by_method = [{variant.name for variant in variants} for variants in (FULL, LORA)]
    for name, others in BESIDE.items():
        assert any({name, *others} <= names for names in by_method), name


def test_layers_share_a_table():
    large = session(case=tiny.LARGER, plain=[1.0], dense=[0.9])
    text = table(session(), large)
    assert "| layer | plain | ours, dense | ours, factored |" in text
    assert "| a layer | 2.00 s, 150/s | - | 0.60× / 0.70× |" in text
    assert "| another layer | 1.00 s, 300/s | 0.90× / 0.70× | - |" in text


def test_parts_have_shares_and_a_rest():
    seconds = {part.name: [0.1] for part in PARTS} | {"step": [1.0], "fold": [0.2]}
    rows = session(case=tiny.PARTS, **seconds)
    fold = next(row for row in rows if row.variant == "fold")
    fold.flops = 0
    text = table(rows)
    assert "| fold W += coef ⊗ e (optimizer) | 200 ms, 20.0% |" in text
    assert "| dX = dY W (backward) | 100 ms, 10.0%, 2100/s |" in text
    assert "| rest of the compressed layer's step | 300 ms, 30.0% |" in text
    more = {part.name: [0.3] for part in PARTS} | {"step": [1.0]}
    assert "| less than none: 800 ms, 80.0% |" in table(session(case=tiny.PARTS, **more))
    del more["fold"]
    text = table(session(case=tiny.PARTS, **more))
    assert "| rest of the compressed layer's step | - |" in text


def test_sessions_before_the_newest_are_shown_too():
    first = session(case=tiny.MODEL, date="2026-01-01", plain=[2.0], factored=[1.0])
    second = session(case=tiny.MODEL, date="2026-01-02", plain=[1.0], factored=[0.8], dense=[0.9])
    layers = [*session(date="2026-01-02"), *session(date="2026-01-03", plain=[1.0])]
    text = table(first, second, layers)
    assert "| time of a step | 2026-01-02, 300/s | 2026-01-01, 150/s |" in text
    assert "| ours, factored / plain | 0.80× (0.80 to 0.80) | 0.50× (0.50 to 0.50) |" in text
    assert "| ours, dense / plain | 0.90× (0.90 to 0.90) | - |" in text
    assert "### Single layers, earlier" in text
    assert "| a layer, 2026-01-02 | 2.00 s, 150/s | 0.60× / 0.70× |" in text
    assert "a layer, 2026-01-03" not in text
    assert "Timed more than once" not in table(first, session())


def test_goals_say_whether_they_are_met(monkeypatch):
    from velora_torch.bench.speed import table as table_room

    goals = [Goal("layer", "factored", "plain", most) for most in (0.6001, 0.59)]
    monkeypatch.setattr(table_room, "GOALS", [*goals, Goal("model", "factored", "plain", 0.1)])
    text = table(session())
    assert "| layer: factored / plain | 0.60× | 0.60× (0.55 to 0.75) | yes | 0.70× |" in text
    assert "| layer: factored / plain | 0.59× | 0.60× (0.55 to 0.75) | no | 0.70× |" in text
    assert "model: factored" not in text
    assert "Goals, day by day" not in text
    earlier = session(date="2026-01-01", plain=[2.0], factored=[1.6])
    text = table(session(date="2026-01-02"), earlier, session(case=tiny.MODEL, date="2026-01-01"))
    assert "| time of a step (bold: met) | at most | 2026-01-02 | 2026-01-01 |" in text
    assert "| layer: factored / plain | 0.60× | **0.60×** | 0.80× |" in text
    assert "| layer: factored / plain | 0.59× | 0.60× | 0.80× |" in text
    assert "| model: factored / plain | 0.10× | - | 0.60× |" in text
    assert "| met |  | 1 of 2 | 0 of 3 |" in text


def test_flops():
    assert [format_flops(n) for n in (300, 2.5e6, 2.5e8, 1.25e10, 3.24e12)] == [
        "300",
        "2.50 M",
        "250 M",
        "12.5 G",
        "3.24 T",
    ]


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"cases": "llama-1042"}, "no case 'llama-1042'; did you mean 'llama-1024'"),
        ({"variants": "factord"}, "no variant 'factord'; did you mean 'factored'"),
        ({"scale": "paper"}, "no scale 'paper'; there are: local, large"),
        ({"cases": ","}, "--cases is empty"),
        ({"rounds": 0}, "--rounds must be at least 1, not 0"),
        ({"cases": "llama-1024", "variants": "lora"}, "none of the cases llama-1024 has a variant"),
        (
            {"tasks": "a"},
            "velora bench speed has no --tasks; its own options are --cases, --rounds",
        ),
        ({"seeds": 3}, "has no --seeds"),
        ({"jobs": 2, "limit": 1}, "has no --jobs or --limit"),
        ({"no_time": True}, "has no --no-time"),
        ({"name": "glue", "cases": "a"}, "velora bench glue has no --cases"),
        ({"name": "vtab", "rounds": 2}, "velora bench vtab has no --rounds"),
        ({"name": "spead"}, "no bench 'spead'; did you mean 'speed'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes(asked, message, tmp_path):
    request = Request(**({"name": "speed", "output": tmp_path / "out"} | asked))
    with pytest.raises(ValueError, match=message):
        bench(request, print)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "peft" else real(name)
    )
    with pytest.raises(ValueError, match=r"peft is not installed: pip install 'velora-torch\[peft"):
        go(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(monkeypatch, capsys, tmp_path):
    arguments = ["bench", "speed", "--list", "--output", str(tmp_path), "--cases", "llama-1024"]
    monkeypatch.setattr("sys.argv", ["velora", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    output = capsys.readouterr().out
    assert not stopped.value.code
    assert output.startswith("1/1  llama-1024 (4 LLaMA blocks of width 1024, 4 × 512 tokens): open")
    arguments = ["bench", "speed", "--seeds", "3"]
    monkeypatch.setattr("sys.argv", ["velora", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "velora bench speed has no --seeds" in capsys.readouterr().err


def test_a_real_case_from_end_to_end(tmp_path):
    said = []
    request = Request("speed", tmp_path, variants="factored,dense", cases="layer", rounds=2)
    assert speed(request, said.append, known=tiny.CASES) == 0
    plain, dense, factored = read_rows(tmp_path / "rows.jsonl")
    assert (plain.variant, dense.variant, factored.variant) == ("plain", "dense", "factored")
    assert factored.flops < plain.flops
    assert all(seconds > 0 for seconds in factored.seconds)
    assert len(CASES) > 50
