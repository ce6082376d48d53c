"""A memory budget for a run: plan on the recipe's model and data, and train with what fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from velora_torch.config import VeloraConfig
from velora_torch.memory.planner.budget import gib
from velora_torch.memory.planner.candidates import RECIPE_OPTIMIZERS, Candidate
from velora_torch.memory.planner.plan import Plan, plan
from velora_torch.memory.planner.table import nothing_fits
from velora_torch.remote_code import trust
from velora_torch.report.results import Prediction
from velora_torch.training import processes, strategies
from velora_torch.training.assets import resolve_model
from velora_torch.training.data import PreparedData, check_context, prepare
from velora_torch.training.schema import Recipe
from velora_torch.training.sections import VeloraSection

Say = Callable[[str], None]

PADDING = 8
"""Batches are padded to multiples of so many tokens."""
CHOSEN = ("gradient_checkpointing", "recompute", "chunked_loss", "optimizer", "longest_first")
"""Settings of the training section that a plan may choose."""
ALSO_KNOWN_AS = {"adamw_8bit": "adamw_8bit"}
"""Names in transformers that are not what recipes of plans use."""


class BudgetError(ValueError):
    """A run does not fit into its memory budget, or cannot be planned."""


def fit(
    recipe: Recipe, data: PreparedData, say: Say, strategy: strategies.Strategy = "ddp"
) -> tuple[Recipe, Prediction]:
    """The fastest way to run a recipe within its budget.

    Settings that the recipe gives are kept; only those that it leaves open are chosen.

    Args:
        recipe: with a memory budget.
        data: prepared; its longest example decides.
        say: shows a line.
        strategy: how several processes share the model; the budget is that of each.

    Returns:
        The recipe with everything chosen, and what was predicted for it.

    Raises:
        BudgetError: nothing fits, with what is missing.
    """
    made = plan_of(recipe, data, say, strategy)
    if not made.candidates:
        raise BudgetError(
            f"memory_budget {recipe.memory_budget}: {nothing_fits(made)}\n"
            f"Lower train.batch_size or data.max_length, or leave more settings open"
        )
    best = made.candidates[0]
    say(
        f"plan: {best.setup}; predicted peak {gib(best.peak_bytes)} of {gib(made.budget_bytes)}, "
        f"{best.step_cost:.2f} of a plain step's FLOPs, gradient: {best.coarseness}"
    )
    return _with(recipe, best), Prediction(
        budget_bytes=made.budget_bytes,
        peak_bytes=best.peak_bytes,
        peak=dict(best.simulation.peak),
        step_cost=best.step_cost,
        setup=str(best.setup),
    )


def preview(recipe: Recipe, say: Say) -> None:
    """Show the plan of a recipe, for which its data are read but no weights.

    Raises:
        BudgetError: nothing fits.
    """
    from velora_torch.training import models

    models.quiet()
    tokenizer = models.load_tokenizer(recipe, say)
    check_context(recipe, models.context(recipe))
    made = plan_of(recipe, prepare(recipe, tokenizer), say)
    say(str(made))
    if not made.candidates:
        raise BudgetError(f"nothing fits into memory_budget {recipe.memory_budget}")


def plan_of(
    recipe: Recipe, data: PreparedData, say: Say, strategy: strategies.Strategy = "ddp"
) -> Plan:
    """Plan the largest batch of a recipe, for one of the processes that were started."""
    import torch

    assert recipe.memory_budget is not None
    config = _configuration(recipe, say)
    say(f"planning for {recipe.memory_budget} of memory")
    return plan(
        config,
        method=recipe.method,
        batch=recipe.train.batch_size,
        seq=_longest(recipe, data, config),
        budget=recipe.memory_budget,
        dtype=recipe.dtype,
        device="cuda" if torch.cuda.is_available() else "cpu",
        top=1,
        gpus=processes.count(),
        strategy=strategy,
        **_given(recipe),
    )


def as_started(recipe: Recipe, former: Recipe) -> Recipe:
    """A recipe that is resumed, with what was chosen when its run began."""
    train = {name: getattr(former.train, name) for name in CHOSEN}
    return recipe.model_copy(
        update={
            "velora": former.velora,
            "train": recipe.train.model_copy(update=train),
            "memory_budget": None,
        }
    )


def _configuration(recipe: Recipe, say: Say) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    config = AutoConfig.from_pretrained(resolve_model(recipe.model, say), **trust())
    # A run trains a causal language model, whatever its checkpoint was saved as.
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is not None:
        config.architectures = [name if isinstance(name, str) else name[0]]
    return config


def _longest(recipe: Recipe, data: PreparedData, config: Any) -> int:
    """Tokens of the longest sequence in a batch, padding included."""
    limit = recipe.data.max_length
    if recipe.data.packing:
        return limit
    longest = min(data.stats["longest"], limit)
    padded = -(-longest // PADDING) * PADDING
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return padded if positions is None else max(longest, min(padded, positions))


def _given(recipe: Recipe) -> dict[str, Any]:
    """Settings for the plan: what the method needs, and what the recipe leaves no choice in."""
    train, named = recipe.train, recipe.train.model_fields_set
    given: dict[str, Any] = {"accumulation": train.accumulation}
    if recipe.lora is not None:
        targets = recipe.lora.targets
        given |= {
            "lora_rank": recipe.lora.r,
            "lora_dropout": recipe.lora.dropout,
            "lora_targets": targets if isinstance(targets, str) else tuple(targets),
        }
    if recipe.quantization is not None:
        given["double_quantization"] = recipe.quantization.double
    if "velora" in recipe.model_fields_set:
        section = recipe.velora
        given["velora"] = None if section is None else VeloraConfig(**section.to_kwargs())
    if "gradient_checkpointing" in named:
        given["checkpoint_every"] = int(train.gradient_checkpointing) or None
    given |= {n: getattr(train, n) for n in ("recompute", "chunked_loss") if n in named}
    if "optimizer" in named:
        given["optimizer"] = _simulated(train.optimizer)
    return given


def _simulated(optimizer: str) -> str:
    names = {theirs: ours for ours, theirs in RECIPE_OPTIMIZERS.items()} | ALSO_KNOWN_AS
    if optimizer not in names:
        raise BudgetError(
            f"train.optimizer {optimizer!r} cannot be planned for; memory_budget knows "
            f"{', '.join(names)}. Choose one of them, or leave it open"
        )
    return names[optimizer]


def _with(recipe: Recipe, best: Candidate) -> Recipe:
    """A recipe with the settings of a plan's candidate."""
    chosen = best.recipe
    update: dict[str, Any] = {"longest_first": True}
    for name in ("gradient_checkpointing", "recompute", "chunked_loss"):
        update[name] = chosen["train"][name]
    if "optimizer" not in recipe.train.model_fields_set:
        update["optimizer"] = chosen["train"]["optimizer"]
    velora = recipe.velora
    if "velora" not in recipe.model_fields_set:
        section = chosen["velora"]
        velora = None if section is None else VeloraSection.model_validate(section)
    train = recipe.train.model_copy(update=update)
    return recipe.model_copy(update={"velora": velora, "train": train})
