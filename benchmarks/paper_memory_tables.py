"""Tables of docs/results/paper-memory.md from the rows of paper_memory.py, and the arithmetic of
the paper's estimates.

The estimates (T3, T5, T6) count the inputs of adapted layers, each layer by itself. All numbers of
T6 follow from five layers of every block (query, key, value, one more of the same width, down) at
2048 bytes per feature: 512 tokens, the published length, in float32, to which PEFT's adapters cast.
"""

from __future__ import annotations

from collections.abc import Iterable

from simulated_rows import GIB, Row, Tables, gib, markdown

# hidden width, intermediate width, blocks
SIZES = {"llama-7b": (4096, 11008, 32), "llama-13b": (5120, 13824, 40)}
TOKENS, BYTES, GROUPS = 512, 4, 32
HALF_A_BYTE = 0.5
"""What the paper's bf16 rows have more than its 4-bit rows, for each weight of a linear layer."""
T5 = {64: 865, 32: 808, 16: 779, 8: 764}
"""Groups, and the paper's MB."""


def counted_inputs(model: str, compressed: Iterable[str] = (), groups: int = GROUPS) -> int:
    """Input activations as the paper counts them, when some layers are compressed."""
    width, inner, blocks = SIZES[model]
    layers = {"q_proj": width, "k_proj": width, "v_proj": width, "o_proj": width}
    layers["down_proj"] = inner
    compressed = set(compressed)
    numbers = sum(groups if name in compressed else size for name, size in layers.items())
    return blocks * TOKENS * BYTES * numbers


def linear_weights(model: str) -> int:
    """Weights of the linear layers of the blocks."""
    width, inner, blocks = SIZES[model]
    return blocks * (4 * width * width + 3 * width * inner)


def tables(rows: list[Row]) -> Tables:
    """All tables of the page by name."""
    by_table: dict[str, list[Row]] = {}
    for row in rows:
        by_table.setdefault(row["table"], []).append(row)
    made = {
        f"{table.lower()}-inferred": inferred(by_table[f"{table} inferred"])
        for table in ("T1", "T2", "T4")
    }
    made |= {"t1": steps(by_table["T1"]), "t2": steps(by_table["T2"]), "t3": t3(by_table["T3"])}
    made |= {
        "t4": by_model(by_table["T4"]),
        "t5": t5(),
        "savings": savings(rows),
        "within": within(rows),
    }
    return made | {"t6": t6(by_table["T6"]), "t7": by_model(by_table["T7"])}


def inferred(rows: list[Row]) -> str:
    """How well each choice fits the rows without VeLoRA; the best six."""
    names = list(rows[0]["ratios"])
    best = sorted(rows, key=lambda row: row["error"])[:6]
    lines = [
        (
            f"**{row['choice']}**" if row["chosen"] else row["choice"],
            *(f"{row['ratios'][name]:.2f}" for name in names),
            f"{row['error']:.0%}",
        )
        for row in best
    ]
    return markdown(("ours / paper", *names, "mean error"), lines)


# VeLoRA row, and the row of the same model that it is compared with
PAIRS = {
    ("T1", "Full + VeLoRA"): "Full",
    ("T1", "LoRA + VeLoRA"): "LoRA",
    ("T2", "VeLoRA"): "Full",
    ("T3", "QLoRA + VeLoRA"): "QLoRA",
    ("T4", "VeLoRA"): "Full",
    ("T6", "value + down"): "none",
    ("T7", "VeLoRA"): "QLoRA (the paper's Full)",
}


def savings(rows: list[Row]) -> str:
    """What VeLoRA saves of the peak, in the paper and here; the first rows of each setting."""
    known: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if "simulated" in row:
            known.setdefault((row["table"], model_of(row), row["method"]), row)
    lines = []
    for (table, model, method), row in known.items():
        base_method = PAIRS.get((table, method))
        if base_method is None:
            continue
        base = known[table, model, base_method]
        peak = base["simulated"]["peak_bytes"]
        lines.append(
            (
                table,
                model,
                f"{base_method} → {method}",
                f"{base['paper_gb'] - row['paper_gb']:.2f}",
                gib(peak - row["simulated"]["peak_bytes"]),
                gib(peak - row["factored"]["peak_bytes"]),
            )
        )
    return markdown(("", "model", "from → to", "paper, GB", "ours", "factored"), lines)


def within(rows: list[Row], share: float = 0.1) -> str:
    """How many rows without VeLoRA agree, by table."""
    lines = []
    for table in ("T1", "T2", "T4", "T7"):
        ratios = [
            row["simulated"]["peak_bytes"] / GIB / row["paper_gb"]
            for row in rows
            if row["table"] == table and "simulated" in row and "VeLoRA" not in row["method"]
        ]
        near = sum(abs(ratio - 1) <= share for ratio in ratios)
        lines.append((table, str(len(ratios)), str(near)))
    return markdown(("", "rows without VeLoRA", f"within {share:.0%} of the paper"), lines)


HEADER = ("paper, GB", "our peak", "ours / paper", "saved", "peak, factored", "saved, factored")


def step(row: Row) -> tuple[str, ...]:
    """The cells of a row that is a whole step's peak."""
    paper = row["paper_gb"]
    shown = "–" if paper is None else f"{paper:.2f}"
    if "skipped" in row:
        return (shown, row["skipped"], "", "", "", "")
    peak = row["simulated"]["peak_bytes"]
    ratio = "–" if paper is None else f"{peak / GIB / paper:.2f}"
    factored = row.get("factored")
    cells = (gib(factored["peak_bytes"]), gib(factored["saved"])) if factored else ("", "")
    return (shown, gib(peak), ratio, gib(row["simulated"]["saved"]), *cells)


def steps(rows: list[Row]) -> str:
    """Rows that the paper measured."""
    lines = [(row["method"], *step(row)) for row in rows]
    return markdown(("method", *HEADER), lines)


def by_model(rows: list[Row]) -> str:
    """The same, with the model in front."""
    lines = [(model_of(row), row["method"], *step(row)) for row in rows]
    return markdown(("model", "method", *HEADER), lines)


def model_of(row: Row) -> str:
    """The preset of a row."""
    return row["simulated"]["model"] if "simulated" in row else row["model"]


def t3(rows: list[Row]) -> str:
    """The paper's estimate, and the peaks that it leaves out."""
    of = {(model_of(row), row["method"], row["simulated"]["batch"]): row for row in rows}
    lines = []
    for (model, method, batch), row in of.items():
        if batch != 1:
            continue
        base = of[model, "QLoRA", 1]["simulated"]
        estimate = base["weights"] - base["gradients"]  # without the adapters
        estimate += counted_inputs(model, ("v_proj", "down_proj") if "VeLoRA" in method else ())
        if "bf16" in method:
            estimate += HALF_A_BYTE * linear_weights(model)
        many = of[model, method, 16]["simulated"]["peak_bytes"]
        ratio = estimate / GIB / row["paper_gb"]
        alone = row["simulated"]["weights"] - row["simulated"]["gradients"]
        peak = gib(row["simulated"]["peak_bytes"])
        factored = gib(row["factored"]["peak_bytes"]) if "factored" in row else ""
        cells = (gib(alone), peak, factored, gib(many, 1))
        lines.append(
            (model, method, f"{row['paper_gb']:.2f}", gib(estimate), f"{ratio:.3f}", *cells)
        )
    names = ("model", "method", "paper, GB", "counted as the paper does", "counted / paper")
    more = ("base weights", "peak, 1 × 512", "factored", "peak, 16 × 512")
    return markdown((*names, *more), lines)


def t5() -> str:
    """Sub-token sizes."""
    lines = []
    for groups, paper in T5.items():
        bytes_ = counted_inputs("llama-7b", ("v_proj", "down_proj"), groups)
        lines.append((f"D/{groups}", str(paper), f"{1000 * bytes_ / GIB:.0f}"))
    return markdown(("M", "paper, MB", "counted, GiB/1000"), lines)


def t6(rows: list[Row]) -> str:
    """Layers: the paper's count, and what a step really saves."""
    with_dropout = [row for row in rows if row["simulated"]["setup"]["lora_dropout"]]
    without = [row for row in rows if not row["simulated"]["setup"]["lora_dropout"]]
    lines = []
    for row, other in zip(with_dropout, without, strict=True):
        paper, layers = row["paper_gb"], row["layers"]
        count = counted_inputs("llama-7b", layers)
        told = paper is not None
        saved = [r["simulated"]["saved"] for r in (with_dropout[0], row, without[0], other)]
        cells = (f"{paper:.2f}", gib(count), f"{count / GIB / paper:.2f}") if told else ("–",) * 3
        freed = (gib(saved[0] - saved[1]), gib(saved[2] - saved[3]))
        lines.append((row["method"], *cells, gib(saved[1]), freed[0], gib(saved[3]), freed[1]))
    names = ("compressed", "paper, GB", "counted as the paper does", "counted / paper")
    more = ("really saved, dropout 0.1", "freed", "really saved, no dropout", "freed")
    return markdown((*names, *more), lines)
