"""`report.html`: one self-contained page about a run, with nothing to fetch and no script."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from statistics import median
from typing import Any

from velora_torch.atomic import write_whole
from velora_torch.report import plots, table
from velora_torch.report.quantities import (
    format_bytes,
    format_count,
    format_loss,
    format_percent,
    format_ratio,
    format_seconds,
    ratio_of,
)
from velora_torch.report.results import Results


@dataclass
class Headline:
    """One of the figures at the top of the page."""

    label: str
    value: str
    detail: str = ""


@dataclass
class LayerGroup:
    """Layers whose names differ in their numbers only, and what is said of all of them."""

    pattern: str
    text: str
    names: list[str] = field(default_factory=list)


def write_report(results: Results, path: str | os.PathLike[str]) -> None:
    """Write the page about `results` to `path`; an older page is replaced in one step."""
    write_whole(path, render_report(results))


def render_report(results: Results) -> str:
    """The page about `results` as HTML text."""
    import jinja2
    from markupsafe import Markup

    source = resources.files("velora_torch.report").joinpath("template.html.jinja")
    environment = jinja2.Environment(
        autoescape=True,  # whatever a model, a recipe or a data set is called, it stays text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": format_count, "duration": format_seconds}
    template = environment.from_string(source.read_text(encoding="utf-8"))
    return template.render(
        results=results,
        headlines=headlines(results),
        # Figures are our own SVG, in which every name is already escaped.
        loss_wide=Markup(plots.loss_curve(results)),
        loss_narrow=Markup(plots.loss_curve(results, width=380, height=260)),
        memory_figure=Markup(plots.memory_bars(results)),
        time_figure=Markup(plots.step_time_bars(results)),
        comparison_header=table.comparison_header(results),
        comparison=table.comparison_lines(results),
        run_memory=_run_memory(results),
        quality_header=table.quality_header(results),
        quality=table.quality_lines(results),
        choices=table.choice_lines(results),
        progress=_progress_facts(results),
        compressed=group_layers(results.model.compressed_layers),
        exact=group_layers(results.model.exact_layers),
        recipe=_recipe_yaml(results.run.recipe),
        facts=_facts(results),
    )


def headlines(results: Results) -> list[Headline]:
    """What the run achieved, in at most four figures; parts that it lacks are left out."""
    found = [_quality_headline(results), *_comparison_headlines(results)]
    shown = [headline for headline in found if headline is not None]
    if len(shown) < 3 and results.history:
        last = results.history[-1]
        speeds = [p.tokens_per_second for p in results.history if p.tokens_per_second]
        if last.loss is not None and (not shown or shown[0].label != "Held-out loss"):
            shown.append(Headline("Training loss", format_loss(last.loss), f"at step {last.step}"))
        if speeds:
            shown.append(Headline("Speed", f"{median(speeds):,.0f}", "tokens per second"))
    if len(shown) < 4 and math.isfinite(results.run.seconds):
        steps = f"{results.history[-1].step:,} steps" if results.history else ""
        shown.append(Headline("Whole run", format_seconds(results.run.seconds), steps))
    return shown


def group_layers(layers: Mapping[str, str]) -> list[LayerGroup]:
    """Layers put together that are named alike and described alike, in the order of the model."""
    groups: dict[tuple[str, str], LayerGroup] = {}
    for name, text in layers.items():
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        group = groups.setdefault((pattern, text), LayerGroup(pattern, text))
        group.names.append(name)
    for group in groups.values():
        if len(group.names) == 1:
            group.pattern = group.names[0]
    return list(groups.values())


def _quality_headline(results: Results) -> Headline | None:
    before, after = results.before, results.after
    known = after or before
    if known is None:
        return None
    if known.accuracy is not None:
        label, field_name = "Held-out accuracy", "accuracy"
    elif known.score is not None:
        label, field_name = f"Held-out {known.metric}", "score"
    elif known.loss is not None:
        label, field_name = "Held-out loss", "loss"
    else:
        return None
    formatted = format_percent if field_name == "accuracy" else format_loss
    detail = f"on {known.examples:,} examples" if known.examples else ""
    if known.accuracy is not None and len(known.choices) > 1:
        detail += f", chance {format_percent(1 / len(known.choices))}"
    if before is not None and after is not None and getattr(before, field_name) is not None:
        old, new = getattr(before, field_name), getattr(after, field_name)
        return Headline(label, f"{formatted(old)} → {formatted(new)}", detail.lstrip(", "))
    when = "after training" if after is not None else "before training"
    return Headline(label, formatted(getattr(known, field_name)), f"{when} {detail}".strip())


def _comparison_headlines(results: Results) -> list[Headline]:
    """Memory and time of the last variant against the first one."""
    if len(results.compare) < 2:
        return []
    plain, ours = results.compare[0], results.compare[-1]
    found = []
    for label, old, new in (
        ("Memory of a step", plain.memory.total, ours.memory.total),
        ("Saved activations", plain.saved_activation_bytes, ours.saved_activation_bytes),
    ):
        ratio = ratio_of(new, old)
        if ratio is not None:
            change = f"{abs(1 - ratio):.0%} {'less' if ratio <= 1 else 'more'}"
            found.append(Headline(label, change, f"{format_bytes(old)} → {format_bytes(new)}"))
    if plain.seconds is not None and ours.seconds is not None:
        ratio = ratio_of(ours.seconds.median, plain.seconds.median)
        if ratio is not None:
            times = (
                f"{format_seconds(plain.seconds.median)} → {format_seconds(ours.seconds.median)}"
            )
            found.append(Headline("Step time", format_ratio(ratio), times))
    return found


def _run_memory(results: Results) -> list[table.Line]:
    """Bytes of this run's own step, for a run that compared nothing."""
    if results.memory is None or results.compare:
        return []
    lines = [
        table.Line(label, [format_bytes(getattr(results.memory, category))])
        for category, (label, _) in plots.CATEGORIES.items()
        if getattr(results.memory, category) is not None
    ]
    if results.memory.total is not None:
        lines.append(table.Line("sum of the four", [format_bytes(results.memory.total)]))
    return lines


def _progress_facts(results: Results) -> list[str]:
    """What is said under the loss curve."""
    history = results.history
    facts = []
    if history:
        facts.append(f"{history[-1].step:,} steps, {len(history):,} of them logged")
    speeds = [p.tokens_per_second for p in history if p.tokens_per_second]
    if speeds:
        facts.append(f"median {median(speeds):,.0f} tokens per second")
    peaks = [p.peak_bytes for p in history if p.peak_bytes]
    if peaks:
        facts.append(f"peak memory {format_bytes(max(peaks))}")
    lost = sum(p.loss is None or not math.isfinite(p.loss) for p in history)
    if lost:
        facts.append(f"{lost:,} logged {'step' if lost == 1 else 'steps'} without a finite loss")
    return facts


def _recipe_yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Text of several lines stays several lines."""

    def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent_text)
    if not recipe:
        return ""
    text: str = yaml.dump(dict(recipe), None, Dumper, sort_keys=False, allow_unicode=True, width=88)
    return text


def _facts(results: Results) -> list[tuple[str, str]]:
    """Machine, versions and command as pairs of a name and a value."""
    run, machine = results.run, results.run.machine
    facts = [
        ("Command", run.command),
        ("Started", run.started.replace("T", " ")),
        ("Duration", format_seconds(run.seconds) if math.isfinite(run.seconds) else ""),
        ("CPU", machine.cpu + (f", {machine.cores} cores" if machine.cores else "")),
        ("Memory", format_bytes(machine.memory_bytes) if machine.memory_bytes else ""),
    ]
    device = machine.device
    if machine.device_memory_bytes:
        device += f", {format_bytes(machine.device_memory_bytes)}"
    facts.append(("Trained on", device))
    facts += [(name, version) for name, version in run.versions.items()]
    return [(name, value) for name, value in facts if value]
