"""The table's numbers, worked out by hand, and the plot's files."""

from __future__ import annotations

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("matplotlib")

from tests.bench import fakes
from velora_torch.bench.grid import cells
from velora_torch.bench.plot import draw
from velora_torch.bench.table import markdown, summarise
from velora_torch.bench.timing import StepTime

MIB = 1024**2
SCORES = {
    ("a", "full"): (0.80, 0.84, 0.82),
    ("a", "full+velora"): (0.81, 0.86, 0.85),
    ("b", "full"): (0.50, 0.60, 0.70),
    ("b", "full+velora"): (0.49, 0.60, 0.71),
    ("a", "probe"): (0.30, 0.30, 0.30),
    ("b", "probe"): (0.10, 0.20, 0.30),
}
TOTALS = {"full": 400 * MIB, "full+velora": 100 * MIB, "probe": 50 * MIB}


def rows(leave_out=()):
    grid = cells(fakes.make_bench(), "local", fakes.TASKS, list(TOTALS), 3)
    return [
        fakes.row(
            cell,
            SCORES[cell.task, cell.variant][cell.seed],
            memory={"total": TOTALS[cell.variant], "saved_activations": 10 * MIB},
            trainable_parameters=12345678,
        )
        for cell in grid
        if (cell.task, cell.variant) not in leave_out
    ]


def step(variant, median):
    return StepTime("fake", "local", "b", variant, "", "s", median, 0.1, 9.0, 7, 1.0, 1, {}, {})


TIMES = [step("full", 2.0), step("full+velora", 1.5)]


def table(given, times=TIMES):
    summary = summarise(fakes.make_bench(), "local", given, times, 18)
    return summary, markdown(summary, "plot.png")


def test_rows_of_the_table():
    _, text = table(rows())
    assert "| method | memory | of it activations | trainable | step | a | b | average |" in text
    assert (
        "| Full | 400 MiB | 10.0 MiB | 12.3 M | 2.00 s | 82.0 ± 1.2 | 60.0 ± 5.8 | 71.0 ± 2.9 |"
    ) in text
    assert (
        "| Linear probing | 50.0 MiB | 10.0 MiB | 12.3 M | - | 30.0 ± 0.0 | 20.0 ± 5.8 | "
        "25.0 ± 2.9 |"
    ) in text
    assert "![accuracy against memory](plot.png)" in text
    assert "18 of 18 cells are finished" in text


def test_pairs():
    summary, text = table(rows())
    # the difference and its error: see test_statistics
    assert "| Full + VeLoRA | Full | +1.00 ± 0.41 | 0.25× | 0.75× | yes |" in text
    assert [(pair.base, pair.verdict) for pair in summary.pairs] == [("Full", "yes")]


def test_a_worse_variant_is_a_no():
    worse = rows()
    for row in worse:
        if row.variant == "full+velora":
            row.score -= 0.02
    assert "| -1.00 ± 0.41 | 0.25× | 0.75× | no |" in table(worse)[1]


def test_missing_cells_are_dashes_and_averages_are_over_shared_tasks():
    summary, text = table(rows(leave_out={("b", "probe")}), times=[])
    assert summary.shared == ["a"]
    assert "| Full | 400 MiB | 10.0 MiB | 12.3 M | 82.0 ± 1.2 | 60.0 ± 5.8 | 82.0 ± 1.2 |" in text
    assert "| 30.0 ± 0.0 | - | 30.0 ± 0.0 |" in text
    assert "over the tasks that all rows have: a; left out: b." in text
    assert "15 of 18 cells" in text
    assert "+2.00 ± 0.58" in text


def test_without_a_shared_task_there_is_no_average():
    _, text = table(rows(leave_out={("b", "probe"), ("a", "full")}))
    assert "No task has been run with all methods" in text
    assert "| Full | - | - | - | 2.00 s | - | 60.0 ± 5.8 | - |" in text
    assert "| Full + VeLoRA | Full | - | - | 0.75× | - |" in text


def test_one_seed_has_no_error():
    _, text = table([row for row in rows() if row.seed == 0])
    assert "| 80.0 | 50.0 | 65.0 |" in text
    assert "| Full + VeLoRA | Full | +0.00 | 0.25× | 0.75× | one seed |" in text


def test_perplexity_has_a_column_where_it_was_measured():
    given = rows()
    for row in given:
        row.perplexity = 20.0 + row.seed
    _, text = table(given)
    assert "| average | perplexity |" in text
    assert "| 71.0 ± 2.9 | 21.00 ± 0.41 |" in text


def test_no_rows_no_table():
    assert "No cell is finished yet." in table([])[1]


def test_the_plot_is_written_in_both_formats(tmp_path):
    assert draw(table(rows())[0], tmp_path / "plot")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "plot.svg").read_text()
    for label in ("Full + VeLoRA", "Linear probing", "memory of a training step, MiB"):
        assert label in svg


def test_nothing_to_plot(tmp_path):
    assert not draw(table([row for row in rows() if row.variant == "full"])[0], tmp_path / "plot")
    assert list(tmp_path.iterdir()) == []
