"""What a bench is: tasks times variants times seeds, and a recipe for each cell of that grid."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora_torch.training.recipe import Recipe

if TYPE_CHECKING:
    from velora_torch.bench.timing import StepTime
    from velora_torch.report.results import Results

RecipeOf = Callable[[str, str, int], dict[str, Any]]
"""(task, variant, seed) -> the settings of a recipe, without `train.output`."""


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    name: str
    """As `--variants` takes it."""
    label: str
    """As the table shows it."""
    base: str | None = None
    """The variant that this one is to be compared with: the same method without VeLoRA."""


@dataclass(frozen=True)
class Scale:
    """One size of a bench: the paper's, or one for a machine without a GPU and a network."""

    tasks: tuple[str, ...]
    """Columns of the table."""
    recipe: RecipeOf
    timed: str
    """The task whose training step is timed for every variant."""
    needs: tuple[tuple[str, str], ...] = ()
    """Packages besides those of the recipes: name, and what installs it."""
    measure: Callable[[Recipe], Mapping[str, float]] | None = None
    """Scores a finished run anew, from the checkpoint in `train.output`; the first score counts.
    ``None``: the run's own score on held-out examples is what counts."""
    details: Callable[[Recipe, Results], Mapping[str, Any]] | None = None
    """What a row keeps besides its scores, from the recipe and the results of its run."""


@dataclass(frozen=True)
class Finished:
    """What a report is written from."""

    bench: Bench
    scale: str
    rows: Sequence[Row]
    """One for each finished cell, all of today's recipes."""
    times: Sequence[StepTime]
    """Times of steps of today's recipes."""
    expected: int
    """Cells of the whole grid."""


@dataclass(frozen=True)
class Bench:
    """A protocol with all its rows and columns."""

    name: str
    title: str
    """Heading of the table."""
    variants: tuple[Variant, ...]
    scales: Mapping[str, Scale]
    notes: str = ""
    """What a reader of the table has to know."""
    report: Callable[[Finished, Path], str] | None = None
    """Writes plots into a folder and returns the table in Markdown; None: accuracy and memory."""

    def variant(self, name: str) -> Variant:
        """The variant of a name."""
        return next(variant for variant in self.variants if variant.name == name)


@dataclass(frozen=True)
class Cell:
    """One run of a bench."""

    bench: str
    scale: str
    task: str
    variant: str
    seed: int
    recipe: Mapping[str, Any] = field(hash=False)
    """The recipe with every default filled in, as JSON values; `train.output` is the default's."""

    @property
    def place(self) -> tuple[str, str, str, str, int]:
        """Where the cell is in all grids; its recipe may change with time."""
        return self.bench, self.scale, self.task, self.variant, self.seed

    @property
    def fingerprint(self) -> str:
        """Identifies what the cell computes."""
        return fingerprint(self.recipe)

    def __str__(self) -> str:
        return f"{self.task}, {self.variant}, seed {self.seed}"


def cells(
    bench: Bench, scale: str, tasks: Sequence[str], variants: Sequence[str], seeds: int
) -> list[Cell]:
    """The cells of a grid, in the order in which they run.

    All tasks and variants of seed 0 come first, and all variants of a task one after another: a
    bench that is interrupted is a balanced table.

    Raises:
        ValueError: a recipe of the bench is not valid.
    """
    made = bench.scales[scale].recipe
    return [
        Cell(bench.name, scale, task, variant, seed, _whole(made(task, variant, seed)))
        for seed in range(seeds)
        for task in tasks
        for variant in variants
    ]


def with_seed(method: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A copy of a method's settings whose random vectors are those of a seed."""
    velora = method["velora"]
    return {**method, "velora": None if velora is None else {**velora, "seed": seed}}


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """A short hash of what a recipe computes; where it writes does not count.

    Settings that are off (null, false, empty) do not count either, so that a setting which
    the library learns later, and which is off by default, leaves finished rows as they are.
    """
    train = {key: value for key, value in recipe["train"].items() if key != "output"}
    said = _set({**recipe, "train": train})
    return digest(said)


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _whole(settings: Mapping[str, Any]) -> dict[str, Any]:
    dumped: dict[str, Any] = Recipe.model_validate(settings).model_dump(mode="json")
    return dumped


def _set(value: Any) -> Any:
    """A JSON value without the parts that say nothing."""
    if isinstance(value, Mapping):
        parts = ((key, _set(item)) for key, item in value.items())
        return {key: item for key, item in parts if not _is_off(item)}
    return value


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == {} or value == []


@dataclass
class Row:
    """What one finished cell has measured; one line of rows.jsonl.

    Times are seconds, memory is in bytes, scores lie between -1 and 1 but for perplexities.
    """

    bench: str
    scale: str
    task: str
    variant: str
    seed: int
    fingerprint: str
    metric: str
    """Name of the score that counts."""
    score: float
    scores: dict[str, float | None] = field(default_factory=dict)
    loss: float | None = None
    perplexity: float | None = None
    """On general text, after training."""
    perplexity_before: float | None = None
    score_before: float | None = None
    trainable_parameters: int | None = None
    memory: dict[str, int | None] = field(default_factory=dict)
    """Of the first training step: weights, saved_activations, gradients, optimizer_state, total."""
    seconds: float = 0.0
    """The whole run."""
    train_seconds: float | None = None
    """From the first step to the last logged one."""
    details: dict[str, Any] = field(default_factory=dict)
    """What this bench keeps besides; see its scale."""
    date: str = ""
    command: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, str, str, str, int]:
        """Where the row's cell is in all grids."""
        return self.bench, self.scale, self.task, self.variant, self.seed

    @property
    def key(self) -> tuple[Any, ...]:
        """What the row has to have in common with a cell to be its result."""
        return (*self.place, self.fingerprint)


def newest(rows: Sequence[Row], grid: Sequence[Cell]) -> tuple[dict[Cell, Row], list[Row]]:
    """Match rows with the cells of a grid.

    Returns:
        The newest row of each cell that has one, and the newest row of each cell whose rows all
        come from another recipe than today's.
    """
    by_key = {row.key: row for row in rows}
    by_place = {row.place: row for row in rows}
    found: dict[Cell, Row] = {}
    stale: list[Row] = []
    for cell in grid:
        row = by_key.get((*cell.place, cell.fingerprint))
        if row is not None:
            found[cell] = row
        elif cell.place in by_place:
            stale.append(by_place[cell.place])
    return found, stale


def changes(row: Row, cell: Cell) -> Iterator[str]:
    """The settings in which a stale row's recipe differs from today's: "key: then -> now"."""
    then, now = dict(_flat(row.recipe)), dict(_flat(cell.recipe))
    for key in sorted({*then, *now} - {"train.output"}):
        if then.get(key) != now.get(key):
            yield f"{key}: {then.get(key)} -> {now.get(key)}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        elif not _is_off(item):
            yield f"{prefix}{key}", item


def row_to_json(row: Row) -> dict[str, Any]:
    """A row as JSON values."""
    return dataclasses.asdict(row)


def row_from_json(document: Mapping[str, Any]) -> Row:
    """A row from JSON values.

    Raises:
        ValueError: a field is missing or unknown.
    """
    known = {item.name: item for item in dataclasses.fields(Row)}
    none = dataclasses.MISSING
    needed = [n for n, i in known.items() if i.default is none and i.default_factory is none]
    missing = [name for name in needed if name not in document]
    unknown = [name for name in document if name not in known]
    if missing:
        raise ValueError(f"the field {missing[0]!r} is missing")
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a field of a bench's row")
    return Row(**document)
