"""The `analysis.md` of an analysis: means over layers, as tables, with the plots."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from velora_torch.analysis.choices import Choice
from velora_torch.analysis.results import Analysis, Projection, Sample, choices_of
from velora_torch.analysis.rows import mean

COLUMNS = {  # field of Projection -> heading
    "energy": "energy kept",
    "stable_rank": "stable rank of z",
    "zeroed": "sub-tokens zeroed",
    "cosine": "cosine",
    "relative_error": "relative error",
    "sparsity": "sparsity",
    "spread": "σ",
    "similarity_change": "similarity change",
    "prediction_gap": "gap to the prediction",
}
MOST_SKIPPED = 12


def common_groups(analysis: Analysis) -> list[int]:
    """The numbers of groups that most layers have: a mean of others is one of other layers."""
    have = Counter(rank.groups for rank in analysis.ranks if rank.step == analysis.steps[0])
    return [count for count in analysis.groups if have[count] == max(have.values())]


def middle(analysis: Analysis) -> int:
    """The number of groups that is shown where only one can be."""
    groups = common_groups(analysis)
    return groups[len(groups) // 2]


def label_of(init: str, vectors: str) -> str:
    """What a choice of v is called."""
    return Choice(init, vectors).label  # type: ignore[arg-type]


def markdown(analysis: Analysis, pictures: Sequence[str]) -> str:
    """The whole page.

    Args:
        analysis: what to tell.
        pictures: files that lie beside the page.
    """
    last = analysis.steps[-1]
    without = [without_gradients(analysis.samples, s, s == last) for s in analysis.steps]
    parts = [_head(analysis), *filter(None, without)]
    parts += [f"![{_alt(name)}]({name})" for name in pictures]
    groups, step = middle(analysis), analysis.steps[-1]
    rows = [row for row in analysis.projections if (row.groups, row.step) == (groups, step)]
    parts.append(f"## Choices of v: {groups} groups, step {step}, mean of the layers")
    parts.append(_choices(rows, _exact_sparsity(analysis, step)))
    parts.append(f"## Cosine between exact and compressed gradient: {groups} groups, step {step}")
    parts.append(_kinds(analysis, rows))
    if len(analysis.steps) > 1:
        parts.append(f"## Cosine over training: {groups} groups, mean of the layers")
        parts.append(_steps(analysis, groups))
    parts.append(f"## Stable rank of all sub-tokens: step {analysis.steps[0]}, mean of the layers")
    parts.append(_ranks(analysis))
    if analysis.skipped:
        parts.append("## Left out")
        parts.append(_skipped(analysis.skipped))
    return "\n\n".join(parts) + "\n"


def without_gradients(samples: Sequence[Sample], step: int, is_last: bool) -> str:
    """A sentence on the layers whose gradients in a step are all zero; "" where there are none."""
    own = [sample for sample in samples if sample.step == step]
    zero = sum(math.isnan(sample.sparsity) for sample in own)
    if not zero:
        return ""
    advice = f": measure a later step too, such as --steps {step},{step + 10}" if is_last else ""
    return (
        f"At step {step} the gradients of {zero} of {len(own)} layers are zero (in LoRA those of A "
        f"are before the first update), so they have no cosine, no error and no sparsity{advice}."
    )


def _head(analysis: Analysis) -> str:
    run = analysis.run
    sizes = [sample.sampled for sample in analysis.samples]
    model = run.recipe.get("model", "a model")
    data = run.recipe.get("data", {}).get("train", "its data")
    return (
        f"# Analysis of {model} on {data}\n\n"
        f"{len(analysis.layers)} layers, {min(sizes)} to {max(sizes)} tokens of each, at steps "
        f"{', '.join(map(str, analysis.steps))} of plain training (`{run.command}`). What each "
        f"number means: docs/analysis.md. All numbers, layer by layer: analysis.json."
    )


def _alt(picture: str) -> str:
    return picture.rpartition(".")[0].replace("_", " ")


def _exact_sparsity(analysis: Analysis, step: int) -> float:
    return mean([sample.sparsity for sample in analysis.samples if sample.step == step])


def _choices(rows: Sequence[Projection], exact_sparsity: float) -> str:
    body = []
    for init, vectors in choices_of(rows):
        own = [row for row in rows if (row.init, row.vectors) == (init, vectors)]
        means = [_number(mean([getattr(row, column) for row in own])) for column in COLUMNS]
        body.append([label_of(init, vectors), *means])
    exact = dict.fromkeys(COLUMNS, "") | {"sparsity": _number(exact_sparsity)}
    body.append(["*exact gradient*", *exact.values()])
    return _table(["v", *COLUMNS.values()], body)


def _kinds(analysis: Analysis, rows: Sequence[Projection]) -> str:
    kind_of, known = analysis.kind_of, choices_of(rows)
    cells: dict[tuple[str, tuple[str, str]], list[float]] = {}
    for row in rows:
        place = (kind_of[row.layer], (row.init, row.vectors))
        cells.setdefault(place, []).append(row.cosine)
    body = [
        [kind, *(_number(mean(cells.get((kind, choice), []))) for choice in known)]
        for kind in analysis.kinds
    ]
    return _table(["layers", *(label_of(*choice) for choice in known)], body)


def _steps(analysis: Analysis, groups: int) -> str:
    rows = [row for row in analysis.projections if row.groups == groups]
    body = []
    for init, vectors in choices_of(rows):
        own = [row for row in rows if (row.init, row.vectors) == (init, vectors)]
        means = [mean([r.cosine for r in own if r.step == step]) for step in analysis.steps]
        body.append([label_of(init, vectors), *map(_number, means)])
    return _table(["v", *(f"step {step}" for step in analysis.steps)], body)


def _ranks(analysis: Analysis) -> str:
    kind_of, step = analysis.kind_of, analysis.steps[0]
    cells: dict[tuple[str, int], list[float]] = {}
    for rank in analysis.ranks:
        if rank.step == step:
            cells.setdefault((kind_of[rank.layer], rank.groups), []).append(rank.shared)
    body = [
        [kind, *(_number(mean(cells.get((kind, count), []))) for count in analysis.groups)]
        for kind in analysis.kinds
    ]
    return _table(["layers", *(f"{count} groups" for count in analysis.groups)], body)


def _skipped(skipped: dict[str, str]) -> str:
    lines = [f"- {what}: {why}" for what, why in list(skipped.items())[:MOST_SKIPPED]]
    if len(skipped) > MOST_SKIPPED:
        lines.append(f"- and {len(skipped) - MOST_SKIPPED} more")
    return "\n".join(lines)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:.3f}" if value < 10 else f"{value:.1f}"
