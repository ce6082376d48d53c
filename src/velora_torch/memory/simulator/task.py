"""Which transformers class a configuration means, and what its forward reads."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Task:
    """One kind of head in transformers."""

    auto: str
    """Name of the class that builds it."""
    names: str
    """Name of transformers' table of such classes."""
    labels_each_token: bool = False
    images: bool = False
    special_tokens: tuple[str, ...] = ()
    """Settings that its forward needs; any token will do."""


CAUSAL = Task("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", labels_each_token=True)
MASKED = Task("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", labels_each_token=True)
SEQ2SEQ = Task(
    "AutoModelForSeq2SeqLM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    labels_each_token=True,
    special_tokens=("decoder_start_token_id", "pad_token_id"),
)
SEQUENCE = Task(
    "AutoModelForSequenceClassification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    special_tokens=("pad_token_id",),
)
IMAGE = Task(
    "AutoModelForImageClassification",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    images=True,
)
TASKS = (SEQ2SEQ, CAUSAL, MASKED, SEQUENCE, IMAGE)


def auto_class(task: Task) -> Any:
    """The transformers class that builds models for a task."""
    import transformers

    return getattr(transformers, task.auto)


def choose_task(config: PretrainedConfig) -> Task:
    """The task of a configuration: that of its ``architectures``, else what its type is made for.

    Raises:
        ValueError: transformers has no model with a head of that type.
    """
    kind = config.model_type
    for name in config.architectures or []:
        for task in TASKS:
            if name in _classes(task, kind):
                return task
    # An encoder's type has a causal head too, but is not made for it.
    usual: tuple[Task, ...] = (SEQ2SEQ,) if config.is_encoder_decoder else ()
    if not getattr(config, "is_decoder", False):
        usual += (MASKED,)
    for task in (*usual, CAUSAL, IMAGE, SEQUENCE):
        if kind in _table(task):
            return task
    known = sorted({name for task in TASKS for name in _table(task)})
    near = difflib.get_close_matches(kind, known, 3, 0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ValueError(
        f"transformers has no language model or classifier of model_type {kind!r}{hint}. Pass a "
        f"built module and a batch instead"
    )


def task_of_class(kind: type) -> Task | None:
    """The task of a transformers class or a subclass of one; does not import transformers."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    for base in kind.__mro__:
        if base.__module__.startswith("transformers.") and base.__name__ in _by_class():
            return _by_class()[base.__name__]
    return None


@cache
def _by_class() -> dict[str, Task]:
    # The first task of a class in several tables wins.
    return {
        name: task
        for task in reversed(TASKS)
        for model_type in _table(task)
        for name in _classes(task, model_type)
    }


def _table(task: Task) -> dict[str, Any]:
    from transformers.models.auto import modeling_auto

    table: dict[str, Any] = getattr(modeling_auto, task.names)
    return table


def _classes(task: Task, model_type: str) -> tuple[str, ...]:
    found = _table(task).get(model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)
