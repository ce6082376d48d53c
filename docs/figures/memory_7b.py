"""Draw docs/figures/memory_7b.svg: the peak of a LLaMA-7B training step by category.

python docs/figures/memory_7b.py [FILE]      (needs matplotlib; the same file every time)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "memory_7b.jsonl"
INK, QUIET = "#1b1f24", "#59636e"
CATEGORIES = {
    "weights": ("weights", "#aab2bb"),
    "optimizer_state": ("optimizer state", "#cc79a7"),
    "gradients": ("gradients", "#e69f00"),
    "saved_activations": ("saved activations", "#0072b2"),
    "logits": ("logits and loss", "#56b4e9"),
    "temporary": ("temporary", "#d3d9df"),
}
CARDS = (24, 48)
"""Memory of common cards, GiB."""


def draw(path: Path, rows_file: Path = ROWS) -> None:
    """Write the figure."""
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    settings = {"svg.hashsalt": "velora-torch", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10.2, 0.4 * len(rows) + 1.1), facecolor="white")
        axes = figure.add_axes((0.285, 0.085, 0.695, 0.835))
        ends = [0.0] * len(rows)
        for category, (label, color) in CATEGORIES.items():
            sizes = [row["peak"][category] / 2**30 for row in rows]
            axes.barh(range(len(rows)), sizes, 0.68, left=ends, color=color, label=label)
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        for place, end in enumerate(ends):
            text = f"{end:.1f}"
            axes.text(end + 0.5, place, text, va="center", color=INK, weight="bold")
        for card in CARDS:
            axes.axvline(card, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
            axes.text(card, -0.78, f"{card} GiB", ha="center", va="bottom", color=QUIET, size=9)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, max(ends) * 1.07)
        axes.set_ylim(len(rows) - 0.45, -0.8)
        axes.set_xlabel("GiB at the largest moment of a step, LLaMA-7B, 4 × 1024 tokens, AdamW")
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        figure.legend(
            loc="upper right", bbox_to_anchor=(0.985, 0.985), ncols=6, frameon=False, fontsize=9
        )
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(path, format="svg", metadata={**metadata, "Description": in_words(rows)})
    # Trailing blanks come from matplotlib's paths; without them the file is clean to commit.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def in_words(rows: list[dict[str, Any]]) -> str:
    """The figure for those who don't see it."""
    return "; ".join(f"{row['name']}: {row['peak_bytes'] / 2**30:.1f} GiB" for row in rows)


if __name__ == "__main__":
    here = Path(__file__).with_suffix(".svg")
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else here)
