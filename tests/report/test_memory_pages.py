import html
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
FIGURE = ROOT / "docs" / "figures" / "memory_7b"


@pytest.fixture(params=["memory_7b", "paper_memory"])
def page(request, monkeypatch):
    """(page, tables from the rows) of a benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module(request.param)
    rows = benchmark.read_rows(benchmark.ROWS)
    return benchmark.PAGE.read_text(encoding="utf-8"), benchmark.tables(rows)


def test_the_tables_of_a_page_are_made_of_its_rows(page):
    text, tables = page
    for name, table in tables.items():
        assert f"<!-- table {name} -->\n\n{table}\n\n<!-- end -->" in text
    assert text.count("<!-- table ") == len(tables)


def test_every_line_of_a_table_has_as_many_cells_as_its_header(page):
    for table in page[1].values():
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_goals_of_the_7b_model_are_reached():
    lines = (RESULTS / "memory_7b.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["name"]: row for row in map(json.loads, lines)}
    assert rows["… + gated activation recomputed"]["saved"] <= 12.5 * 2**30
    assert rows["GC + VeLoRA on all block linears"]["peak_bytes"] <= 17.5 * 2**30


def test_categories_of_a_peak_add_up_to_it():
    for file in ("memory_7b.jsonl", "paper_memory.jsonl"):
        for line in (RESULTS / file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for held in (row, row.get("simulated"), row.get("factored")):
                if held and "peak" in held:
                    assert sum(held["peak"].values()) == held["peak_bytes"]


@pytest.mark.parametrize(
    ("layers", "paper_gb"),
    [
        ((), 1.67),
        (("q_proj",), 1.42),
        (("down_proj",), 1.01),
        (("v_proj", "down_proj"), 0.76),
    ],
    ids=["none", "query", "down", "value-down"],
)
def test_the_estimate_of_input_activations_is_the_papers(layers, paper_gb, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    arithmetic = importlib.import_module("paper_memory_tables")
    counted = arithmetic.counted_inputs("llama-7b", layers) / 2**30
    assert counted == pytest.approx(paper_gb, abs=0.011)


def test_the_figure_is_drawn_the_same_every_time(tmp_path):
    files = [tmp_path / "first.svg", tmp_path / "second.svg"]
    for file in files:
        subprocess.run([sys.executable, FIGURE.with_suffix(".py"), file], check=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"<dc:date>" not in files[0].read_bytes()


def test_the_committed_figure_shows_the_committed_rows():
    svg = html.unescape(FIGURE.with_suffix(".svg").read_text(encoding="utf-8"))
    lines = (RESULTS / "memory_7b.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        assert f"{row['name']}: {row['peak_bytes'] / 2**30:.1f} GiB" in svg
    assert "(../figures/memory_7b.svg)" in (PAGES / "memory.md").read_text(encoding="utf-8")
