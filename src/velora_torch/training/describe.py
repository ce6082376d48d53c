"""A recipe in a few lines of plain text."""

from __future__ import annotations

from velora_torch.training.schema import Recipe
from velora_torch.training.sections import TrainSection


def describe(recipe: Recipe) -> str:
    """Summarise a run."""
    data, train, evaluate = recipe.data, recipe.train, recipe.evaluate
    if train.tokens is not None:
        duration = f"{train.tokens} tokens, {recipe.steps():,} steps"
    elif train.steps is not None:
        duration = f"{train.steps} steps"
    else:
        duration = f"{train.epochs:g} epoch{'' if train.epochs == 1 else 's'}"
    kind = "images" if recipe.task == "image-classification" else "sequences"
    batch = f"{train.batch_size} {kind}"
    if train.accumulation > 1:
        batch = f"{train.batch_size} × {train.accumulation} {kind}"
    held_out = data.eval or data.eval_split or "its own split, or split off"
    when = [name for name in ("before", "after") if getattr(evaluate, name)]
    rows = {
        "model": f"{recipe.model}, {recipe.dtype} weights",
        "task": recipe.task,
        "method": _method(recipe),
        "velora": _velora(recipe),
        "data": f"{data.train} (held out: {held_out}), {_size(recipe)}",
        "template": data.template.replace("\n", "\\n"),
        "training": f"{duration} of {batch}, {train.optimizer}, learning rate "
        f"{train.learning_rate:g}{_other_rates(train)} ({train.schedule}), seed {train.seed}"
        + "".join(f", {saving}" for saving in _savings(train))
        + (", autocast" if train.autocast else ""),
        "evaluation": f"{' and '.join(when) or 'none'}" + (f", {evaluate.metric}" if when else ""),
        "output": train.output,
    }
    if recipe.task != "language-modeling":
        del rows["template"]
    if recipe.tokenizer is not None:
        size = recipe.tokenizer.vocab_size
        rows["tokenizer"] = recipe.tokenizer.source or f"trained on the data, {size:,} tokens"
    if recipe.memory_budget is not None:
        rows["memory"] = f"at most {recipe.memory_budget}: savings that are not given are planned"
    return "\n".join(f"{name:<11} {text}" for name, text in rows.items())


METHOD_NAMES = {
    "full": "full-parameter training",
    "linear-probe": "the head only",
    "bitfit": "biases only (BitFit)",
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "pissa": "LoRA started by PiSSA",
    "olora": "LoRA started by OLoRA",
    "adalora": "AdaLoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "ia3": "IA3",
    "ssf": "SSF",
    "hydra": "Hydra",
    "qlora": "LoRA on a quantised base",
    "coefficients": "VeLoRA coefficients on a frozen base",
}
"""Methods in words."""


def _size(recipe: Recipe) -> str:
    """How large an example is."""
    data = recipe.data
    if recipe.task == "image-classification":
        return "images of the model's size" if data.image_size is None else f"{data.image_size} px"
    return f"at most {data.max_length} tokens" + (", packed" if data.packing else "")


def _other_rates(train: TrainSection) -> str:
    """The learning rates of layers that have their own, in words."""
    return "".join(f", {rate:g} for {name}" for name, rate in train.learning_rates.items())


def _savings(train: TrainSection) -> list[str]:
    """What saves memory exactly, in words."""
    every = train.gradient_checkpointing
    words = []
    if every:
        few = every is not True and every > 1
        words.append("gradient checkpointing" + (f" of 1 block in {every}" if few else ""))
    if train.recompute:
        words.append("recomputed norms and activations")
    if train.chunked_loss:
        words.append("chunked loss")
    return words


def _method(recipe: Recipe) -> str:
    suffix = ""
    if recipe.lora is not None:
        suffix = f", rank {recipe.lora.r}, alpha {recipe.lora.alpha:g}"
        if recipe.lora.restart_every is not None:
            suffix += f", merged and begun anew every {recipe.lora.restart_every} steps (ReLoRA)"
    if recipe.hydra is not None:
        suffix = f", rank {recipe.hydra.r}, alpha {recipe.hydra.alpha:g}"
    if recipe.quantization is not None:
        suffix += f", {recipe.quantization.type}"
    return METHOD_NAMES[recipe.method] + suffix


def _velora(recipe: Recipe) -> str:
    if recipe.memory_budget is not None and "velora" not in recipe.model_fields_set:
        return "as planned"
    if recipe.velora is None:
        return "off: plain training"
    rest = {k: v for k, v in recipe.velora.to_kwargs().items() if k != "targets"}
    settings = ", ".join(f"{k}={v}" for k, v in rest.items()) or "default settings"
    targets = recipe.velora.targets
    return f"{targets if isinstance(targets, str) else ', '.join(targets)}: {settings}"
