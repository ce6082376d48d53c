"""A recipe's model and data, put together: ready for a trainer, or for a step that is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from velora_torch.training import models
from velora_torch.training.data import PreparedData, check_context, prepare
from velora_torch.training.precision import precision
from velora_torch.training.schema import Recipe

Say = Callable[[str], None]


@dataclass
class Assembled:
    """What a training step of a recipe needs."""

    recipe: Recipe
    tokenizer: Any
    """None for images."""
    data: PreparedData
    model: Any
    """Adapted by the recipe's method and compressed."""

    def make_batch(self) -> dict[str, Any]:
        """A batch of the recipe's size, of the first training examples, where the model is."""
        assert self.data.collator is not None
        train, size = self.data.train, self.recipe.train.batch_size
        rows = [dict(train[index % len(train)]) for index in range(size)]
        device = next(self.model.parameters()).device
        return {key: value.to(device) for key, value in self.data.collator(rows).items()}

    def loss(self, batch: dict[str, Any]) -> Any:
        """The loss of a batch (0-d), computed in the recipe's precision."""
        with precision(self.recipe, next(self.model.parameters()).device.type):
            return self.model(**batch).loss

    def make_optimizer(self) -> Any:
        """A new optimizer, with the groups and settings that the trainer gives it."""
        return make_optimizer(self.recipe, self.model, self.tokenizer, self.data)


def assemble(recipe: Recipe, say: Say) -> Assembled:
    """Load and prepare everything for a recipe's training step."""
    models.quiet()
    tokenizer, data = prepare_data(recipe, say)
    model = place(models.load_model(recipe, say, data))
    models.save_memory(recipe, model)
    if recipe.train.gradient_checkpointing is True:  # in a run the trainer does it
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Assembled(recipe, tokenizer, data, model)


def prepare_data(recipe: Recipe, say: Say) -> tuple[Any, PreparedData]:
    """The tokenizer (None for images) and the data of a recipe."""
    if recipe.task == "pretrain":
        from velora_torch.training.pretraining.prepare import prepare_pretraining

        return prepare_pretraining(recipe, say)
    tokenizer = None
    if recipe.task != "image-classification":
        tokenizer = models.load_tokenizer(recipe, say)
        check_context(recipe, models.context(recipe))
    return tokenizer, prepare(recipe, tokenizer)


def make_optimizer(recipe: Recipe, model: Any, tokenizer: Any, data: PreparedData) -> Any:
    """The optimizer that the trainer makes for a model."""
    from velora_torch.training.trainer import Record, build_trainer

    quiet = recipe.model_copy(deep=True)
    quiet.train.tensorboard = False
    output = Path(recipe.train.output)
    trainer = build_trainer(quiet, model, tokenizer, data, output, Record(), lambda line: None)
    return trainer.create_optimizer()


def place(model: Any) -> Any:
    """Move a model to the accelerator, if there is one; quantised ones are there already."""
    import torch

    if torch.cuda.is_available() and not getattr(model, "is_quantized", False):
        return model.to("cuda")
    return model
