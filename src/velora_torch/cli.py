"""The command `velora`: thin; each command calls one function of the library."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:  # the library works without the command's dependencies
    sys.exit("velora: the command needs more packages: pip install 'velora-torch[train]'")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train transformers with compressed activations and factored gradients (VeLoRA).",
)

INTERRUPTED = 130


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
) -> None:
    """Fine-tune a model as a recipe says; ends with a checkpoint, results.json and report.html."""
    from velora_torch.training.recipe import load_recipe, recipe_to_yaml

    loaded = load_recipe(recipe, overrides or [])
    if print_config:
        typer.echo(recipe_to_yaml(loaded), nl=False)
        return
    from velora_torch.training.data import check_sources
    from velora_torch.training.models import check_settings

    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    check_settings(loaded)
    check_sources(loaded)
    if dry_run:
        typer.echo(loaded.describe())
        return
    from rich.console import Console

    from velora_torch.report.table import comparison_table, quality_table
    from velora_torch.training.run import Options, run

    console = Console(highlight=False, soft_wrap=True)
    options = Options(shlex.join(["velora", *sys.argv[1:]]), resume, overwrite)
    results = run(loaded, options, lambda line: console.print(line, markup=False))
    if results.before or results.after:
        console.print(quality_table(results))
    if results.compare:
        console.print(comparison_table(results))
    console.print(f"Results: {loaded.train.output}/report.html", markup=False)
    if results.run.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished or interrupted run.")],
    to: Annotated[Path, typer.Option(help="Where to write; must not exist yet.")],
    lora: Annotated[
        bool, typer.Option("--lora", help="A PEFT LoRA adapter instead of whole weights.")
    ] = False,
) -> None:
    """Turn a run into a plain checkpoint or a LoRA adapter."""
    from velora_torch.training.exporting import export_run

    typer.echo(export_run(run, to, lora))


def main() -> None:
    """Run the command; a mistake of the user's is one message, never a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
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
