"""Results to build tables and pages from; the numbers are invented."""

from __future__ import annotations

import math

from velora_torch.report.results import (
    ComparisonRow,
    Evaluation,
    HistoryPoint,
    MachineInfo,
    Memory,
    ModelInfo,
    Quality,
    Results,
    RunInfo,
    StepSeconds,
)

MIB = 2**20


def bare(status: str = "finished") -> Results:
    """A run of which nothing but its name is known."""
    return Results(
        run=RunInfo(name="bare", status=status),  # type: ignore[arg-type]
        model=ModelInfo(name="model", parameters=10, trainable_parameters=10),
    )


def full(steps: int = 120) -> Results:
    """A run with every part."""
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
    return Results(
        run=RunInfo(
            name="demo",
            status="finished",
            command="velora train recipes/demo.yaml",
            started="2025-01-02T03:04:05+00:00",
            seconds=412.3,
            recipe={
                "model": {"name": "SmolLM2-135M-Instruct"},
                "velora": {"targets": "all-linear", "num_groups": 16, "refresh_every": None},
                "data": {"train": "trec", "template": "{question}\nAnswer:"},
            },
            versions={"python": "3.11.9", "torch": "2.14.1", "velora_torch": "0.1.0"},
            machine=MachineInfo(cpu="Example CPU @ 2.5GHz", cores=2, memory_bytes=8 * 1024 * MIB),
        ),
        model=ModelInfo(
            name="HuggingFaceTB/SmolLM2-135M-Instruct",
            parameters=134_515_008,
            trainable_parameters=134_515_008,
            compressed_layers={
                f"model.layers.{i}.{kind}": "576 features in 16 groups of 36"
                for i in range(30)
                for kind in kinds
            },
            exact_layers={
                "lm_head": "tied to model.embed_tokens",
                "model.embed_tokens": "embedding",
            },
        ),
        history=[
            HistoryPoint(
                step=10 * i,
                loss=0.3 + 3.2 * math.exp(-i / 14) + 0.25 * math.sin(7.3 * i) / (1 + i / 9),
                learning_rate=1e-4,
                grad_norm=1.5,
                seconds=2.1 * i,
                tokens_per_second=1480.0 + i,
                peak_bytes=(1900 + i) * MIB,
            )
            for i in range(1, steps + 1)
        ],
        evaluations=[
            Evaluation(step=s, loss=0.45 + 2.4 * math.exp(-s / 140), accuracy=0.8, examples=100)
            for s in range(0, 10 * steps + 1, max(1, 10 * steps // 4))
        ],
        before=Quality(
            accuracy=0.184,
            loss=3.41,
            examples=500,
            choices=["abbreviation", "entity", "description", "human", "location", "number"],
            accuracy_by_choice={"entity": 0.1, "human": 0.2},
        ),
        after=Quality(
            accuracy=0.894,
            loss=0.41,
            examples=500,
            choices=["abbreviation", "entity", "description", "human", "location", "number"],
            accuracy_by_choice={"entity": 0.85, "human": 0.95},
        ),
        memory=Memory(513 * MIB, 298 * MIB, 122 * MIB, 244 * MIB),
        compare=[
            ComparisonRow(
                variant="plain AdamW",
                seconds=StepSeconds(1.41, 1.38, 1.52, 5),
                saved_activation_bytes=612 * MIB,
                gradient_bytes=513 * MIB,
                optimizer_bytes=1026 * MIB,
                weights_bytes=513 * MIB,
                loss=3.412,
            ),
            ComparisonRow(
                variant="VeLoRA",
                seconds=StepSeconds(1.12, 1.09, 1.2, 5),
                saved_activation_bytes=298 * MIB,
                gradient_bytes=122 * MIB,
                optimizer_bytes=244 * MIB,
                weights_bytes=513 * MIB,
                loss=3.412,
            ),
        ],
        notes=["The comparison alternates the two variants, five repeats each."],
    )


def full_of(text: str) -> Results:
    """A run in which everything that has a name is called `text`: model, data, answers, layers."""
    results = full()
    results.run.name = results.model.name = results.run.command = results.run.started = text
    results.run.machine.cpu = results.run.machine.device = results.run.versions["torch"] = text
    results.run.recipe = {text: text, "data": {"train": text, "template": f"{text}\n{text}"}}
    results.notes = [text]
    results.model.exact_layers = results.model.compressed_layers = {text: text}
    for quality in (results.before, results.after):
        assert quality is not None
        quality.choices, quality.accuracy_by_choice = [text, "other"], {text: 0.5}
    for row in results.compare:
        row.variant = text
    return results
