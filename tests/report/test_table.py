import pytest

from velora_torch.report.results import ComparisonRow, Quality
from velora_torch.report.table import (
    comparison_header,
    comparison_lines,
    comparison_markdown,
    comparison_table,
    quality_markdown,
    quality_table,
)

from .samples import bare, full

pytest.importorskip("rich")


def printed(table) -> str:
    import io

    from rich.console import Console

    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_comparison_markdown():
    assert comparison_markdown(full()).splitlines() == [
        "|  | plain AdamW | VeLoRA | ratio |",
        "| --- | ---: | ---: | ---: |",
        "| step time, median of 5 | 1.41 s | 1.12 s | 0.79× |",
        "| fastest to slowest | 1.38 s – 1.52 s | 1.09 s – 1.20 s |  |",
        "| saved activations | 612 MiB | 298 MiB | 0.49× |",
        "| gradients | 513 MiB | 122 MiB | 0.24× |",
        "| optimizer state | 1.00 GiB | 244 MiB | 0.24× |",
        "| weights | 513 MiB | 513 MiB | 1.00× |",
        "| sum of the four | 2.60 GiB | 1.15 GiB | 0.44× |",
        "| loss of the step | 3.412 | 3.412 |  |",
    ]


def test_quality_markdown():
    assert quality_markdown(full()).splitlines() == [
        "|  | before | after |",
        "| --- | ---: | ---: |",
        "| accuracy | 18.4% | 89.4% |",
        "| loss | 3.410 | 0.410 |",
        "| examples | 500 | 500 |",
    ]


def test_terminal_tables_say_the_same():
    text = printed(comparison_table(full()))
    for line in comparison_lines(full()):
        row = next(row for row in text.splitlines() if line.label.strip() in row)
        assert all(cell in row for cell in line.cells)
    assert "18.4%" in printed(quality_table(full()))


def test_nothing_measured():
    assert comparison_markdown(bare()) == quality_markdown(bare()) == ""
    assert "not measured in this run" in printed(comparison_table(bare()))
    assert "not measured in this run" in printed(quality_table(bare()))


def test_a_variant_that_measured_little_has_dashes():
    results = full()
    results.compare[1] = ComparisonRow("VeLoRA", gradient_bytes=2**20)
    cells = {line.label: line.cells for line in comparison_lines(results)}
    assert cells["gradients"] == ["513 MiB", "1.00 MiB", "0.0019×"]
    assert cells["saved activations"] == ["612 MiB", "–", "–"]
    assert all(len(c) == len(comparison_header(results)) for c in cells.values())


def test_a_single_variant_has_no_ratio():
    results = full()
    del results.compare[1:]
    assert comparison_header(results) == ["plain AdamW"]
    assert {len(line.cells) for line in comparison_lines(results)} == {1}


def test_three_variants_each_have_a_ratio_to_the_first():
    results = full()
    results.compare.append(ComparisonRow("GaLore", gradient_bytes=513 * 2**20))
    header = comparison_header(results)
    assert header[3:] == ["VeLoRA, ratio", "GaLore, ratio"]
    assert {len(line.cells) for line in comparison_lines(results)} == {len(header)}


def test_names_are_text_not_mark_up():
    results = full()
    results.compare[1].variant = "[red]a|b[/red] <b>"
    assert "[red]a|b[/red] <b>" in printed(comparison_table(results))
    assert "[red]a\\|b[/red] &lt;b>" in comparison_markdown(results).splitlines()[0]


def test_quality_of_a_run_that_has_only_a_loss_after():
    results = bare()
    results.after = Quality(loss=1.5)
    assert quality_markdown(results).splitlines()[2:] == ["| loss | 1.500 |"]


def test_scores_of_a_regression_and_perplexity_have_lines():
    results = bare()
    scores = {"pearson": 0.71234, "spearman": None}
    results.after = Quality(
        loss=0.5, examples=12, metric="pearson", scores=scores, perplexity=18.88
    )
    assert quality_markdown(results).splitlines()[2:] == [
        "| pearson | 0.712 |",
        "| spearman | – |",
        "| perplexity, general text | 18.880 |",
        "| loss | 0.500 |",
        "| examples | 12 |",
    ]
    assert results.after.score == 0.71234
