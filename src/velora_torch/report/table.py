"""The comparison and quality tables, for the terminal (rich) and for Markdown.

`comparison_lines` and `quality_lines` hold what the tables say; the HTML page shows the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from velora_torch.report.quantities import (
    format_bytes,
    format_loss,
    format_percent,
    format_ratio,
    format_score,
    format_seconds,
    ratio_of,
)
from velora_torch.report.results import ComparisonRow, Results

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Line:
    """One line of a table: what it is about, and its cells as text."""

    label: str
    cells: list[str]


def comparison_header(results: Results) -> list[str]:
    """Column titles of the comparison, the label's column left out."""
    variants = [row.variant for row in results.compare]
    if len(variants) <= 2:
        return variants + ["ratio"] * (len(variants) - 1)
    return variants + [f"{variant}, ratio" for variant in variants[1:]]


def comparison_lines(results: Results) -> list[Line]:
    """The steps' times and bytes, and ratios to the first variant; what was measured only."""
    rows = results.compare
    quantities: list[tuple[str, Callable[[ComparisonRow], float | None], _Format]] = [
        (
            _time_label(rows),
            lambda row: row.seconds.median if row.seconds else None,
            format_seconds,
        ),
        ("saved activations", lambda row: row.saved_activation_bytes, format_bytes),
        ("gradients", lambda row: row.gradient_bytes, format_bytes),
        ("optimizer state", lambda row: row.optimizer_bytes, format_bytes),
        ("weights", lambda row: row.weights_bytes, format_bytes),
        ("sum of the four", lambda row: row.memory.total, format_bytes),
    ]
    lines = []
    for label, quantity, formatted in quantities:
        values = [quantity(row) for row in rows]
        if any(value is not None for value in values):
            ratios = [format_ratio(ratio_of(value, values[0])) for value in values[1:]]
            lines.append(Line(label, [formatted(value) for value in values] + ratios))
    if rows and rows[0].seconds is not None:
        spread = Line("  fastest to slowest", [_spread(row) for row in rows] + [""] * len(rows[1:]))
        lines.insert(1, spread)
    if any(row.loss is not None for row in rows):
        losses = [format_loss(row.loss) for row in rows]
        lines.append(Line("loss of the step", losses + [""] * len(rows[1:])))
    return lines


def comparison_table(results: Results) -> Table:
    """The plain step next to the VeLoRA step, for the terminal."""
    return _rich_table("One training step", comparison_header(results), comparison_lines(results))


def comparison_markdown(results: Results) -> str:
    """The plain step next to the VeLoRA step as a Markdown table; "" if it was not measured."""
    return _markdown(comparison_header(results), comparison_lines(results))


def quality_header(results: Results) -> list[str]:
    """Column titles of the quality table, the label's column left out."""
    titles = ("before", results.before), ("after", results.after)
    return [title for title, quality in titles if quality is not None]


def quality_lines(results: Results) -> list[Line]:
    """Accuracy, other scores, loss and number of examples before and after training."""
    measured = [quality for quality in (results.before, results.after) if quality is not None]
    lines = []
    if any(quality.accuracy is not None for quality in measured):
        lines.append(Line("accuracy", [format_percent(q.accuracy) for q in measured]))
    others = dict.fromkeys(name for q in measured for name in q.scores if name != "accuracy")
    for name in others:
        shown = format_loss if name == "perplexity" else format_score
        lines.append(Line(name, [shown(q.scores.get(name)) for q in measured]))
    if any(quality.perplexity is not None for quality in measured):
        cells = [format_loss(q.perplexity) for q in measured]
        lines.append(Line("perplexity, general text", cells))
    if any(quality.loss is not None for quality in measured):
        lines.append(Line("loss", [format_loss(q.loss) for q in measured]))
    if any(quality.examples for quality in measured):
        lines.append(Line("examples", [f"{q.examples:,}" for q in measured]))
    return lines


def choice_lines(results: Results) -> list[Line]:
    """Accuracy on the examples of each right answer, before and after training."""
    measured = [quality for quality in (results.before, results.after) if quality is not None]
    names = dict.fromkeys(name for quality in measured for name in quality.accuracy_by_choice)
    return [
        Line(name, [format_percent(q.accuracy_by_choice.get(name)) for q in measured])
        for name in names
    ]


def quality_table(results: Results) -> Table:
    """Accuracy and loss before and after training, for the terminal."""
    return _rich_table("Held-out examples", quality_header(results), quality_lines(results))


def quality_markdown(results: Results) -> str:
    """Accuracy and loss before and after training as a Markdown table; "" if not evaluated."""
    return _markdown(quality_header(results), quality_lines(results))


_Format = Callable[[float | None], str]


def _time_label(rows: Sequence[ComparisonRow]) -> str:
    repeats = {row.seconds.repeats for row in rows if row.seconds is not None}
    return f"step time, median of {repeats.pop()}" if len(repeats) == 1 else "step time, median"


def _spread(row: ComparisonRow) -> str:
    if row.seconds is None:
        return format_seconds(None)
    return f"{format_seconds(row.seconds.low)} – {format_seconds(row.seconds.high)}"


def _rich_table(title: str, header: Sequence[str], lines: Sequence[Line]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Names are wrapped in Text: rich would read square brackets in a plain string as mark-up.
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("")
    for name in header:
        table.add_column(Text(name), justify="right")
    if not lines:
        table.add_row(Text("not measured in this run"))
    for line in lines:
        table.add_row(Text(line.label), *(Text(cell) for cell in line.cells))
    return table


def _markdown(header: Sequence[str], lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    rows = [["", *header], ["---", *["---:"] * len(header)]]
    rows += [[line.label.strip(), *line.cells] for line in lines]
    return "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in rows)


def _markdown_cell(text: str) -> str:
    """A cell that keeps to its own column and is not read as HTML."""
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
