"""Cells run once, in order; what fails, stops or has changed is told, and nothing is lost."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from tests.bench import fakes
from velora_torch.bench.grid import cells, row_to_json
from velora_torch.bench.progress import seconds_left
from velora_torch.bench.runner import Runner, read_rows
from velora_torch.bench.store import append_line


def grid(seeds=1):
    return cells(fakes.make_bench(), "local", fakes.TASKS, [v.name for v in fakes.VARIANTS], seeds)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


class Said(list):
    def __call__(self, line):
        self.append(line)

    def text(self):
        return "\n".join(self)


def go(path, runs, seeds=1, limit=None, said=None, jobs=1):
    said = Said() if said is None else said
    return Runner(path, runs, said, jobs).run(grid(seeds), limit)


def test_all_cells_run_in_the_order_of_the_grid(path):
    runs = fakes.Runs()
    outcome = go(path, runs, seeds=2)
    assert runs.ran == [str(cell) for cell in grid(2)]
    assert [row.place for row in read_rows(path)] == [cell.place for cell in grid(2)]
    assert (len(outcome.rows), outcome.failed, outcome.left) == (12, {}, 0)


def test_finished_cells_are_skipped(path):
    go(path, fakes.Runs(), limit=4)
    again = fakes.Runs()
    outcome = go(path, again)
    assert again.ran == [str(cell) for cell in grid()[4:]]
    assert len(outcome.rows) == len(read_rows(path)) == 6


def test_a_limit_counts_open_cells(path):
    assert go(path, fakes.Runs(), limit=4).left == 2
    assert go(path, fakes.Runs(), limit=1).left == 1


def test_a_cell_of_a_former_recipe_runs_again_and_its_row_stays(path):
    stale = dataclasses.replace(fakes.row(grid()[1], 0.9), fingerprint="former")
    append_line(path, row_to_json(stale))
    said, runs = Said(), fakes.Runs()
    outcome = go(path, runs, said=said)
    assert len(runs.ran) == 6
    assert said[0].startswith("6 cells: 0 finished, 1 to run again because their recipe has")
    assert stale not in outcome.rows
    assert stale in read_rows(path)


def test_a_failure_is_told_and_the_others_go_on(path):
    said = Said()
    runs = fakes.Runs(fail=("a, full+velora, seed 0",))
    outcome = go(path, runs, said=said)
    assert len(runs.ran) == 6
    assert {str(cell): why for cell, why in outcome.failed.items()} == {
        "a, full+velora, seed 0": "RuntimeError: no luck with a, full+velora, seed 0"
    }
    assert "cell 2/6: a, full+velora, seed 0: FAILED: RuntimeError: no luck" in said.text()
    assert len(read_rows(path)) == 5
    again = fakes.Runs()
    go(path, again)
    assert again.ran == ["a, full+velora, seed 0"]


def test_ctrl_c_keeps_what_is_finished(path):
    with pytest.raises(KeyboardInterrupt):
        go(path, fakes.Runs(interrupt="a, probe, seed 0"))
    assert [row.variant for row in read_rows(path)] == ["full", "full+velora"]


def test_a_row_is_on_the_disk_before_it_is_shown(path):
    on_disk = []
    go(path, fakes.Runs(), said=lambda line: on_disk.append(len(read_rows(path))))
    assert on_disk == [0, 1, 2, 3, 4, 5, 6]


def test_progress_lines(path):
    said = Said()
    seconds = iter(range(0, 1000, 10))
    Runner(path, fakes.Runs(perplexity=12.345), said, clock=lambda: next(seconds)).run(grid())
    assert said[1] == (
        "cell 1/6: a, full, seed 0: accuracy 0.500, perplexity 12.35, 2.00 s; "
        "elapsed 10.0 s, left 10.0 s"
    )
    assert said[-1].endswith("left 0.00 ms")


def test_time_left_is_the_mean_of_each_variant():
    a_full, a_velora, a_probe, b_full, b_velora, b_probe = grid()
    rows = [
        fakes.row(a_full, seconds=10.0),
        fakes.row(b_full, seconds=20.0),
        fakes.row(a_velora, seconds=5.0),
    ]
    # full 15, full+velora 5, probe unknown: the mean of both, 10
    assert seconds_left(rows, [b_velora, a_probe, b_probe]) == 25.0
    assert seconds_left(rows, [b_velora, a_probe, b_probe], jobs=2) == 12.5
    assert seconds_left([], [a_full]) is None


def test_a_foreign_line_is_named(path):
    append_line(path, {"bench": "fake"})
    with pytest.raises(ValueError, match=r"rows.jsonl: row 1: the field 'scale' is missing"):
        go(path, fakes.Runs())


# ------------------------------------------------------------------ several at a time


def test_cells_in_processes_survive_a_failure_and_a_killed_process(path):
    said = Said()
    outcome = Runner(path, fakes.run_elsewhere, said, jobs=2).run(grid())
    reasons = {str(cell): why for cell, why in outcome.failed.items()}
    assert reasons["a, full+velora, seed 0"] == "ValueError: refused"
    assert "its process was killed" in reasons["a, probe, seed 0"]
    rows = read_rows(path)
    assert len(rows) + len(reasons) == 6
    assert len(rows) >= 3  # at most one other cell ran beside the one that was killed
    assert all(row.machine["pid"] != os.getpid() for row in rows)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {row.machine["cores"] for row in rows} == {threads}


def test_ctrl_c_ends_the_processes(path):
    # A shell starts what runs in the background with the signal ignored.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    here = threading.main_thread().ident
    assert here is not None
    press = threading.Timer(0.5, signal.pthread_kill, (here, signal.SIGINT))
    press.start()
    with pytest.raises(KeyboardInterrupt):
        Runner(path, fakes.sleep, Said(), jobs=2).run(grid())
    press.join()
    signal.signal(signal.SIGINT, former)
    assert multiprocessing.active_children() == []


KILLED = """
import sys
from pathlib import Path
from tests.bench import fakes, test_runner
from velora_torch.bench.runner import Runner
if __name__ == "__main__":
    Runner(Path(sys.argv[1]), fakes.sleep, print, jobs=2).run(test_runner.grid())
"""


def test_processes_end_with_the_one_that_is_killed(path, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as main:
        assert main.stdout is not None
        at_work = 0
        while at_work < 2:
            line = main.stdout.readline()
            assert line, "it ended by itself"
            at_work += line == fakes.AT_WORK
        main.kill()
        main.communicate(timeout=30)  # the output ends when no process has it any more
