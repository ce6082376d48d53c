"""The paper's memory tables, simulated at full size: docs/results/paper-memory.md.

What the paper does not say (batch, precision, padded length) is inferred once per table, from its
rows without VeLoRA; each VeLoRA row is then a prediction. No GPU is needed.

    python benchmarks/paper_memory.py           # about five minutes; rows and page
    python benchmarks/paper_memory.py --page    # the page from the rows that are there
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paper_memory_tables import tables
from simulated_rows import GIB, Row, held, read_rows, update
from tiny_lm import write_rows
from velora_torch import VeloraConfig
from velora_torch.memory.simulator.presets import preset

HERE = Path(__file__).parent
ROWS = HERE / "results" / "paper_memory.jsonl"
PAGE = HERE.parent / "docs" / "results" / "paper-memory.md"

Case = dict[str, Any]
NOT_HERE = "not simulated"


# ------------------------------------------------------------------------ one row


def row(table: str, method: str, paper_gb: float | None, model: Any, /, **settings: Any) -> Row:
    """A row of the paper, simulated; with VeLoRA twice, by the dense gradient and the factor."""
    result = held(model, **settings)
    entry = {"table": table, "method": method, "paper_gb": paper_gb, "simulated": result}
    velora = settings.get("velora")
    if velora is not None:
        settings["velora"] = VeloraConfig(**{**velora.to_dict(), "gradient": "factored"})
        entry["factored"] = held(model, **settings)
    return entry


def absent(table: str, method: str, paper_gb: float) -> Row:
    return {"table": table, "method": method, "paper_gb": paper_gb, "skipped": NOT_HERE}


def velora(targets: Any, **settings: Any) -> VeloraConfig:
    """As the paper computes it, without bookkeeping for exports."""
    return VeloraConfig(targets=targets, gradient="dense", track_delta=False, **settings)


# ------------------------------------------------------------------------ what is not said


def autocast(model: nn.Module, batch: Any) -> Tensor:
    """The loss under mixed precision with weights in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    loss: Tensor = output.loss
    return loss


PRECISIONS: dict[str, Case] = {
    "fp32": {"dtype": "float32"},
    "16-bit": {"dtype": "float16"},
    "autocast": {"dtype": "float32", "loss": autocast},
}


def infer(
    table: str, anchors: dict[tuple[str, str], tuple[float, Case]], choices: dict[str, Case]
) -> tuple[Case, list[Row]]:
    """The choice that fits the anchors best by mean relative error, and a row for each choice."""
    rows = []
    for label, choice in choices.items():
        ratios = {}
        for (model, method), (paper_gb, settings) in anchors.items():
            peak = held(model, **choice, **settings)["peak_bytes"]
            ratios[f"{model} {method}"] = peak / GIB / paper_gb
        error = sum(abs(ratio - 1) for ratio in ratios.values()) / len(ratios)
        rows.append(
            {"table": f"{table} inferred", "choice": label, "ratios": ratios, "error": error}
        )
    best = min(rows, key=lambda entry: entry["error"])
    for entry in rows:
        entry["chosen"] = entry is best
    print(f"{table}: {best['choice']}, mean error {best['error']:.1%}", flush=True)
    return choices[best["choice"]], rows


def grid(precisions: list[str], **options: list[Any]) -> dict[str, Case]:
    """All combinations, such as ``16-bit, batch 8``."""
    choices = {}
    for precision, *values in itertools.product(precisions, *options.values()):
        more = dict(zip(options, values, strict=True))
        label = ", ".join([precision, *(f"{name} {value}" for name, value in more.items())])
        choices[label] = PRECISIONS[precision] | more
    return choices


# ------------------------------------------------------------------------ the tables


def vit_with_trained_head(dtype: torch.dtype) -> nn.Module:
    """Linear probing, without data."""
    from transformers import ViTForImageClassification

    with torch.device("meta"):
        model = ViTForImageClassification._from_config(preset("vit-b-16"), dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    return model


def lora(rank: int, *targets: str, **settings: Any) -> Case:
    """PEFT's LoRA with adapters in the type of the model."""
    chosen = targets or "all-linear"
    more = {"lora_targets": chosen, "adapters_in_float32": False}
    return {"method": "lora", "lora_rank": rank, **more, **settings}


def t1() -> Iterator[Row]:
    model, heads = "vit-b-16", ("q_proj", "v_proj")
    anchors = {(model, "Full"): (4.25, {}), (model, "LoRA"): (2.86, lora(4, *heads))}
    choice, rows = infer("T1", anchors, grid([*PRECISIONS], batch=[16, 32, 64]))
    yield from rows
    down, adapters = velora(["fc2"], sub_token_size=32), velora("all-linear", sub_token_size=16)
    probed = vit_with_trained_head(getattr(torch, choice["dtype"]))
    yield row("T1", "Full", 4.25, model, **choice)
    yield row("T1", "Full + VeLoRA", 4.02, model, velora=down, **choice)
    yield row("T1", "Linear probing", 1.84, probed, **choice)
    for method, paper_gb in (("SSF", 4.13), ("SSF + VeLoRA", 3.46)):
        yield absent("T1", method, paper_gb)
    for method, paper_gb in (("Hydra", 3.10), ("Hydra + VeLoRA", 2.88)):
        yield absent("T1", method, paper_gb)
    yield row("T1", "LoRA", 2.86, model, **lora(4, *heads), **choice)
    yield row("T1", "LoRA + VeLoRA", 2.74, model, **lora(16, *heads, velora=adapters), **choice)


ROBERTA_LAYERS = r".*(attention\.self\.value|(?<!attention\.)output\.dense)"


def roberta_with_trained_layers(dtype: torch.dtype) -> nn.Module:
    """Only the value and down projections and the classifier train, without data."""
    from transformers import RobertaForSequenceClassification

    with torch.device("meta"):
        model = RobertaForSequenceClassification._from_config(preset("roberta-base"), dtype=dtype)
    for name, parameter in model.named_parameters():
        down = "output.dense" in name and "attention.output" not in name
        trained = "attention.self.value" in name or down or name.startswith("classifier")
        parameter.requires_grad_(trained)
    return model


def t2() -> Iterator[Row]:
    model, galore = "roberta-base", {"optimizer": "galore_adamw"}
    adapters = lora(8, "query", "value")
    anchors = {
        (model, "Full"): (4.64, {}),
        (model, "GaLore"): (4.04, galore),
        (model, "LoRA"): (2.71, adapters),
    }
    choices = grid([*PRECISIONS], batch=[16], seq=[128, 192, 256, 512])
    choice, rows = infer("T2", anchors, choices)
    yield from rows
    compressed = velora(ROBERTA_LAYERS, sub_token_size=16)
    partly = roberta_with_trained_layers(getattr(torch, choice["dtype"]))
    yield row("T2", "Full", 4.64, model, **choice)
    yield row("T2", "GaLore", 4.04, model, **galore, **choice)
    yield row("T2", "LoRA", 2.71, model, **adapters, **choice)
    yield row("T2", "VeLoRA", 2.23, model, velora=compressed, **choice)
    yield row("T2", "VeLoRA, all other layers frozen", 2.23, partly, velora=compressed, **choice)


LLAMAS = {
    # T3: LoRA bf16, QLoRA, QLoRA + VeLoRA; T7: QLoRA, checkpointing, VeLoRA
    "llama-7b": (32, (8.79, 5.77, 4.88), (13.64, 7.31, 8.35)),
    "llama-13b": (64, (15.82, 9.91, 8.48), (21.35, 11.72, 13.28)),
}
LENGTH, GROUPS = 512, 32


def qlora(rank: int, **settings: Any) -> Case:
    """The published settings: all seven projections, dropout 0.1, 512 tokens."""
    return {"method": "qlora", "lora_rank": rank, "lora_dropout": 0.1, "seq": LENGTH, **settings}


def adapters_of(*layers: str) -> VeloraConfig:
    return velora(rf".*({'|'.join(layers)})\.lora_A\.default", num_groups=GROUPS)


def t3() -> Iterator[Row]:
    for model, (rank, (bf16, nf4, compressed), _) in LLAMAS.items():
        for batch in (1, 16):
            base = qlora(rank, batch=batch)
            plain = base | {"method": "lora", "adapters_in_float32": False}
            both = adapters_of("v_proj", "down_proj")
            for method, paper_gb, settings in (
                ("LoRA bf16", bf16, plain),
                ("LoRA fp4", nf4, base),
                ("QLoRA", nf4, base),
                ("QLoRA + VeLoRA", compressed, base | {"velora": both}),
            ):
                if method == "LoRA fp4":  # as large as nf4
                    settings = base | {"double_quantization": False}
                yield row("T3", method, paper_gb, model, **settings)


def t4() -> Iterator[Row]:
    galore = {"optimizer": "galore_adamw"}
    paper = {
        "llama-60m": {"Full": 1.30, "GaLore": 1.27, "LoRA": 0.86, "FLoRA": 1.27, "VeLoRA": 1.18},
        "llama-130m": {"Full": 2.32, "GaLore": 2.02, "LoRA": 1.24, "FLoRA": 2.01, "VeLoRA": 1.83},
    }
    ranks = {"llama-60m": 128, "llama-130m": 256}
    checkpointing = {"llama-60m": 1.19, "llama-130m": 1.85}
    anchors: dict[tuple[str, str], Any] = {}
    for model, numbers in paper.items():
        anchors[model, "Full"] = (numbers["Full"], {})
        anchors[model, "GaLore"] = (numbers["GaLore"], galore)
    choices = grid(["fp32", "16-bit"], batch=[1, 2, 4, 8, 16], seq=[256])
    choice, rows = infer("T4", anchors, choices)
    yield from rows
    compressed = velora(["v_proj", "down_proj"], sub_token_size={"v_proj": 8, "down_proj": 16})
    for model, numbers in paper.items():
        for method, settings in (
            ("Full", {}),
            ("GaLore", galore),
            ("LoRA", lora(ranks[model])),
            ("FLoRA", None),
            ("VeLoRA", {"velora": compressed}),
        ):
            if settings is None:
                yield absent("T4", method, numbers[method]) | {"model": model}
            else:
                yield row("T4", method, numbers[method], model, **settings, **choice)
        settings = {"checkpoint_every": 1} | choice
        yield row("T4", "Gradient checkpointing (T7)", checkpointing[model], model, **settings)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def t6() -> Iterator[Row]:
    for dropout in (0.1, 0.0):
        for method, paper_gb, layers in (
            ("none", 1.67, ()),
            ("one of query, key, value", 1.42, ("v_proj",)),
            ("down", 1.01, ("down_proj",)),
            ("value + down", 0.76, ("v_proj", "down_proj")),
            ("query, key, value, down", 0.24, ("q_proj", "k_proj", "v_proj", "down_proj")),
            ("all seven projections", None, PROJECTIONS),
        ):
            settings = qlora(32, batch=1) | {"lora_dropout": dropout}
            if layers:
                settings["velora"] = adapters_of(*layers)
            yield row("T6", method, paper_gb, "llama-7b", **settings) | {"layers": layers}


def t7() -> Iterator[Row]:
    for model, (rank, _, paper) in LLAMAS.items():
        base = qlora(rank, batch=1)
        both, every = adapters_of("v_proj", "down_proj"), adapters_of(*PROJECTIONS)
        for method, paper_gb, settings in (
            ("QLoRA (the paper's Full)", paper[0], {}),
            ("Gradient checkpointing", paper[1], {"checkpoint_every": 1}),
            ("VeLoRA", paper[2], {"velora": both}),
            ("VeLoRA on all seven projections", None, {"velora": every}),
        ):
            yield row("T7", method, paper_gb, model, **base, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="no simulation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        rows = []
        for simulated in (t1, t2, t3, t4, t6, t7):
            for entry in simulated():
                rows.append({"benchmark": "paper_memory", **entry})
                if "simulated" in entry:
                    peak = entry["simulated"]["peak_bytes"] / GIB
                    print(entry["table"], entry["method"], f"{peak:.2f} GiB", flush=True)
        write_rows(ROWS, rows, "python benchmarks/paper_memory.py")
    update(PAGE, tables(read_rows(ROWS)))


if __name__ == "__main__":
    main()
