"""Which architectures VeLoRA compresses, found by running a tiny model of each.

    python benchmarks/compatibility.py            # print the README's table and the whole page
    python benchmarks/compatibility.py --write    # put them in README.md and docs/results

The models are those of the tests (tests/architectures), with random weights. Every number comes
from one forward and backward pass with and without VeLoRA: about a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import transformers

from marked import replaced
from velora_torch.atomic import write_whole
from velora_torch.bench.writing import markdown_grid
from velora_torch.report.quantities import format_bytes, format_ratio

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the catalogue is a part of the tests

from tests.architectures.architecture import Architecture  # noqa: E402
from tests.architectures.catalogue import CATALOGUE  # noqa: E402
from tests.architectures.promises import CONFIG, compare  # noqa: E402

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results" / "compatibility.md"
BEGIN = "<!-- made by benchmarks/compatibility.py -->"
END = "<!-- end of compatibility -->"
COMMAND = "python benchmarks/compatibility.py --write"
USED_ELSEWHERE = "weight used without calling the layer: its gradient shrinks, its input is kept"

INTRODUCTION = """\
# Compatibility

A tiny model of each architecture, random weights, {count} in all. In `tests/architectures` each
of them keeps these promises after `velora.compress` on all linear layers: outputs are bitwise
those of the plain model in evaluation and training mode (dropout included), gradients of all
uncompressed parameters and of all layers' inputs are bitwise exact, autograd saves fewer bytes,
three optimizer steps move every compressed weight, `restore` gives back a plain model, a plain
checkpoint loads, and a resumed run goes on to the same bits.

*Layers* are modules whose own parameters are factors of a matrix product or convolution while the
model runs; embeddings and norms are none. *Saved* is what autograd keeps of one training forward,
without and with VeLoRA at {groups} groups per layer. The models are about 32 features wide, so
these ratios say that bytes fall, not by how much in a real model: `velora explain` tells that.
What stays plain is in `velora.summary(model)`, with these reasons.

Known limits: experts that are one parameter of three dimensions are no linear layers, and stay
plain with all that they keep; so do convolutions, `nn.MultiheadAttention` and weights that are
tied to an embedding. The output head stays plain unless `targets` names it. A weight that code
outside of its layer multiplies by trains through a small gradient, but its input is kept. A
subclass of `nn.Linear` with a forward of its own is compressed if that multiplies its input by the
whole weight and does nothing else with the weight.

Command: `{command}`. torch {torch}, transformers {transformers}, timm {timm}.

"""


@dataclass(frozen=True)
class Row:
    """What one architecture's models did."""

    architecture: Architecture
    compressed: int
    layers: int
    plain_bytes: int
    compressed_bytes: int
    exact: tuple[str, ...]
    """What stays plain, and why; also what is compressed only in part."""

    @property
    def ratio(self) -> float:
        """Saved bytes, with VeLoRA / without."""
        return self.compressed_bytes / self.plain_bytes


def measure(architecture: Architecture) -> Row:
    """Run an architecture with and without VeLoRA."""
    found = compare(architecture)
    plain = [name for name in found.multiplying if name not in found.layers]
    reasons = Counter((_reason(found.exact[name]), _ending(name)) for name in plain)
    reasons.update((USED_ELSEWHERE, _ending(name)) for name in found.compressed.uncalled)
    return Row(
        architecture,
        len(found.layers),
        len(found.layers) + len(plain),
        found.plain.saved,
        found.compressed.saved,
        tuple(sorted(_described(reasons))),
    )


def _reason(text: str) -> str:
    """A reason without what to do about it, and without the names of layers."""
    return text.partition(" (")[0].partition(": shares")[0]


def _ending(name: str) -> str:
    """The part of a name that says which layer of a block it is."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() or parts[-1] == "weight" else parts[-1:])


def _described(reasons: Counter[tuple[str, str]]) -> list[str]:
    layers: dict[str, list[str]] = defaultdict(list)
    for (reason, ending), count in sorted(reasons.items()):
        layers[reason].append(f"{count} × `{ending}`")
    return [f"{', '.join(names)}: {reason}" for reason, names in layers.items()]


def page(rows: list[Row]) -> str:
    """The whole table, one line for each architecture."""
    introduction = INTRODUCTION.format(
        count=len(rows),
        groups=CONFIG.num_groups,
        command=COMMAND,
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        timm=timm.__version__,
    )
    header = ["architecture", "kind", "layers compressed", "saved without", "with", "ratio"]
    header.append("stays plain")
    body = map(cells, rows)
    return introduction + markdown_grid(header, body, words=("kind", "stays plain")) + "\n"


def cells(row: Row) -> list[str]:
    """A line of the page's table."""
    return [
        row.architecture.name,
        row.architecture.kind,
        f"{row.compressed} of {row.layers}",
        format_bytes(row.plain_bytes),
        format_bytes(row.compressed_bytes),
        format_ratio(row.ratio),
        "; ".join(row.exact) or "nothing",
    ]


def short_table(rows: list[Row]) -> str:
    """One line for each kind of architecture."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row.architecture.kind].append(row)
    body = [
        [
            kind,
            ", ".join(row.architecture.name for row in of_kind),
            f"{sum(row.compressed for row in of_kind)} of {sum(row.layers for row in of_kind)}",
        ]
        for kind, of_kind in kinds.items()
    ]
    names = "as transformers and timm name them"
    header = [f"{len(rows)} architectures", names, "layers compressed"]
    return markdown_grid(header, body, words=(names,))


def with_table(readme: str, rows: list[Row]) -> str:
    """A README with today's short table between its marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    return replaced(readme, BEGIN, short_table(rows), END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the README and the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(architecture) for architecture in CATALOGUE]
    if not arguments.write:
        print(short_table(rows), page(rows), sep="\n\n")
        return
    readme = with_table(README.read_text(encoding="utf-8"), rows)
    write_whole(PAGE, page(rows))
    write_whole(README, readme)


if __name__ == "__main__":
    main()
