"""The command `velora`: thin; each command calls one function of the library."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:  # the library works without the command's dependencies
    sys.exit("velora: the command needs more packages: pip install 'velora-torch[train]'")

from velora_torch.quiet import quiet
from velora_torch.remote_code import FLAG, trust_remote_code

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train transformers with compressed activations and factored gradients (VeLoRA).",
)

SIGNALLED = 128
"""Added to a signal's number: how shells and schedulers know what has ended a command."""
INTERRUPTED = SIGNALLED + signal.SIGINT
NOTHING_FITS = 1
FAILED = 1

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        FLAG,
        callback=trust_remote_code,
        help="Run Python code that comes with the model. Never a recipe's choice.",
    ),
]


@app.callback()
def _main() -> None:
    """Keep `velora` a group of commands."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as recipes/demo.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.steps=20."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run in the output folder.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the recipe with all defaults, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, its files and names, and stop.")
    ] = False,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="Under torchrun: ddp, a whole model in each process; fsdp2, a shard; zero1, zero2."
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="Under torchrun: split each layer over so many processes.")
    ] = 1,
    trust_code: TrustRemoteCode = False,
) -> None:
    """Fine-tune a model as a recipe says; ends with a checkpoint, results.json and report.html."""
    from velora_torch.training.processes import alike, is_first
    from velora_torch.training.recipe import load_recipe, recipe_to_yaml

    with alike(max(1, tensor_parallel)):  # what a step takes depends on it
        loaded = load_recipe(recipe, overrides or [])
        described = loaded.describe() if dry_run else ""
    if print_config:
        typer.echo(recipe_to_yaml(loaded), nl=False)
        return
    from velora_torch.training.data import check_sources
    from velora_torch.training.models import check_settings
    from velora_torch.training.output import check_output
    from velora_torch.training.strategies import check_split, check_trained, chosen

    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    sharing = chosen(strategy)
    check_trained(sharing, loaded)
    check_split(tensor_parallel, sharing, loaded)
    check_output(loaded.train.output, resume)
    check_settings(loaded)
    check_sources(loaded)
    if dry_run:
        typer.echo(described)
        if loaded.memory_budget is not None:
            from velora_torch.training.budget import preview

            preview(loaded, typer.echo)
        return
    from rich.console import Console

    from velora_torch.report.table import comparison_table, quality_table
    from velora_torch.training.run import Options, run

    console = Console(highlight=False, soft_wrap=True)
    command = shlex.join(["velora", *sys.argv[1:]])
    options = Options(command, resume, overwrite, strategy=sharing, tensor_parallel=tensor_parallel)
    results = run(loaded, options, lambda line: console.print(line, markup=False))
    if is_first():
        if results.before or results.after:
            console.print(quality_table(results))
        if results.compare:
            console.print(comparison_table(results))
        console.print(f"Results: {loaded.train.output}/report.html", markup=False)
    if results.run.signal is not None:
        raise typer.Exit(SIGNALLED + results.run.signal)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished or interrupted run.")],
    to: Annotated[Path, typer.Option(help="Where to write; must not exist yet.")],
    lora: Annotated[
        bool, typer.Option("--lora", help="A PEFT LoRA adapter instead of whole weights.")
    ] = False,
    trust_code: TrustRemoteCode = False,
) -> None:
    """Turn a run into a plain checkpoint or a LoRA adapter."""
    from velora_torch.training.exporting import export_run

    typer.echo(export_run(run, to, lora))


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(help="A hub id, a folder, a config.json, or a preset such as llama-7b."),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Sequences or images of a batch.")] = 1,
    seq: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a sequence; by default the model's own, at most 1024."),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Layers to compress; may be repeated.")
    ] = None,
    groups: Annotated[int | None, typer.Option(help="Numbers kept per token and layer.")] = None,
    sub_token_size: Annotated[
        int | None, typer.Option(help="Features for one kept number, instead of --groups.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    chart: Annotated[
        Path | None, typer.Option(help="Draw plain next to VeLoRA into a .png or .svg file.")
    ] = None,
    trust_code: TrustRemoteCode = False,
) -> None:
    """Which layers keep how much for the backward pass, and what compressing really frees."""
    import json

    from velora_torch.config import VeloraConfig
    from velora_torch.memory.ledger.chart import check_chart, draw
    from velora_torch.memory.ledger.command import explain_named

    if chart is not None:
        check_chart(chart)
    wanted = targets or ["all-linear"]
    config = VeloraConfig(
        targets=wanted[0] if len(wanted) == 1 else wanted,
        num_groups=groups,
        sub_token_size=sub_token_size,
    )
    explained = explain_named(model, batch, seq, dtype, config)
    if chart is not None:
        draw(explained.what_if, chart, explained.title)
    typer.echo(json.dumps(explained.to_dict(), indent=2) if as_json else str(explained))


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="A hub id, a folder, a config.json, or a preset such as llama-7b.")
    ],
    budget: Annotated[str, typer.Option(help="Memory of a GPU, such as 24GiB.")],
    method: Annotated[str, typer.Option(help="full, lora or qlora.")] = "full",
    batch: Annotated[
        int, typer.Option(min=1, help="Sequences or images of a batch, per rank.")
    ] = 1,
    seq: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a sequence; by default the model's own, at most 1024."),
    ] = None,
    max_batch: Annotated[
        bool, typer.Option("--max-batch", help="Search the largest batch that fits.")
    ] = False,
    max_seq: Annotated[
        bool, typer.Option("--max-seq", help="Search the longest sequence that fits.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    gpus: Annotated[
        int, typer.Option(help="Ranks, one on each GPU; batch and budget are those of one rank.")
    ] = 1,
    strategy: Annotated[
        str, typer.Option(help="Of several: ddp, a whole model on each GPU; or fsdp2, a shard.")
    ] = "ddp",
    optimizer: Annotated[
        list[str] | None,
        typer.Option(help="An optimizer to try, the preferred one first; may be repeated."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Show so many at most.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust_code: TrustRemoteCode = False,
) -> None:
    """The fastest ways to train that fit into a memory budget; needs no GPU and no weights."""
    from rich.console import Console

    from velora_torch.memory.planner.plan import plan as make_plan
    from velora_torch.memory.planner.table import as_printed

    with Console(stderr=True).status("planning") as status:  # on a terminal alone
        made = make_plan(
            model,
            method=method,
            batch=batch,
            seq=seq,
            budget=budget,
            dtype=dtype,
            device=device,
            optimizers=optimizer,
            max_batch=max_batch,
            max_seq=max_seq,
            top=top,
            gpus=gpus,
            strategy=strategy,
            progress=lambda n: status.update(f"planning: simulating training step {n}"),
        )
    if as_json:
        import json

        typer.echo(json.dumps([candidate.to_dict() for candidate in made.candidates], indent=2))
    else:
        typer.echo(as_printed(made, sys.stdout), nl=False)
    if not made.candidates:
        if as_json:
            typer.echo(str(made), err=True)
        raise typer.Exit(NOTHING_FITS)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="vtab, glue, alpaca, pretrain or speed.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; runs/bench/NAME by default.")
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="local: two CPU cores, no network; or paper; pretrain: long; speed: large."
        ),
    ] = "local",
    tasks: Annotated[str | None, typer.Option(help="Some of the tasks, such as a,b.")] = None,
    cases: Annotated[
        str | None, typer.Option(help="speed: some of the cases of any scale, such as a,b.")
    ] = None,
    variants: Annotated[str | None, typer.Option(help="Some of the methods, such as x,y.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="speed: timed steps of each variant; 15 by default.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each task and method; 3 by default.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at the same time; 1 by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after so many runs.")] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="Show all runs or cases and which are finished.")
    ] = False,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Write table and plot of what is finished.")
    ] = False,
    no_time: Annotated[bool, typer.Option("--no-time", help="Do not time training steps.")] = False,
) -> None:
    """Run a published protocol, or time steps: rows, a table, a plot; a stopped bench goes on."""
    from velora_torch.bench.command import bench as run_bench
    from velora_torch.bench.request import Request

    request = Request(
        name,
        output,
        scale,
        tasks,
        variants,
        seeds,
        jobs,
        limit,
        list_only,
        table_only,
        no_time,
        shlex.join(["velora", *sys.argv[1:]]),
        cases,
        rounds,
    )
    try:
        failed = run_bench(request, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def analyze(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as recipes/demo.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Such as velora.targets=v_proj."),
    ] = None,
    steps: Annotated[
        str, typer.Option(help="Steps of plain training before each measurement, such as 0,50.")
    ] = "0",
    groups: Annotated[
        str, typer.Option(help="Numbers of groups to cut inputs into.")
    ] = "4,8,16,32,64",
    tokens: Annotated[int, typer.Option(help="Tokens to sample from each layer and step.")] = 256,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write, new or empty; runs/analyze/NAME by default."),
    ] = None,
    trust_code: TrustRemoteCode = False,
) -> None:
    """What compression would do to a recipe's activations and gradients: JSON, plots, tables."""
    from velora_torch.analysis.run import Request, numbers
    from velora_torch.analysis.run import analyze as run_analysis
    from velora_torch.training.data import check_sources
    from velora_torch.training.models import check_settings
    from velora_torch.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    request = Request(
        output or Path("runs/analyze") / recipe.stem,
        numbers(steps, "steps"),
        numbers(groups, "groups"),
        tokens,
        shlex.join(["velora", *sys.argv[1:]]),
    )
    request.check(loaded)
    check_settings(loaded)
    check_sources(loaded)
    run_analysis(loaded, request, lambda line: print(line, flush=True))
    typer.echo(f"Analysis: {request.output}/analysis.md")


def main() -> None:
    """Run the command; a mistake of the user's is one message, never a traceback."""
    quiet()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("VELORA_DEBUG"):
            raise
        print(f"velora: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
