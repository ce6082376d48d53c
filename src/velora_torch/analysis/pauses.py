"""A trainer's callback that marks where its steps begin and end, and stops after the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Pauses(TrainerCallback):
    """Tells when a step begins, and when its gradients are complete.

    Args:
        last: the last step that is looked at; training stops after it.
        check_length: called with the number of steps of the whole training, before the first.
        begin: called with the number of optimizer steps before this one.
        finish: called with the same number, before the optimizer's step.
    """

    def __init__(
        self,
        last: int,
        check_length: Callable[[int], None],
        begin: Callable[[int], None],
        finish: Callable[[int], None],
    ) -> None:
        self._last, self._check_length = last, check_length
        self._begin, self._finish = begin, finish

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Check that the training is long enough."""
        self._check_length(state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The first forward pass of a step comes next."""
        self._begin(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """All gradients of the step are there."""
        self._finish(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Stop where nothing more is to be seen."""
        if state.global_step > self._last:
            control.should_training_stop = True
