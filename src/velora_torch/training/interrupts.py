"""Signals that end a run in good order: it saves, and can be resumed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Protocol

from transformers import TrainerCallback

from velora_torch.training import processes

NOTICES: dict[int, str] = {
    signal.SIGINT: "interrupted: saving (Ctrl-C again stops at once)\n",
    signal.SIGTERM: "asked to terminate: saving\n",
}
"""What ends a run in good order: Ctrl-C, and what schedulers and spot instances send."""


class Interruptible(Protocol):
    """What is told."""

    signal: int | None


@contextmanager
def interruptible(record: Interruptible) -> Iterator[None]:
    """Let the first signal set `record.signal`, for the run to save and stop.

    A second Ctrl-C stops at once; launchers send SIGTERM more than once, so that a second one
    changes nothing.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if record.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        record.signal = int(number)
        # Whatever is being printed is not finished: Python's own files can't be used here.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, NOTICES[number].encode())

    with ExitStack() as stack:
        for number in NOTICES:
            stack.callback(signal.signal, number, signal.signal(number, handle))
        yield


def agree(record: Interruptible) -> None:
    """Let every process know of a signal that one of them has got; all must ask."""
    record.signal = processes.most(record.signal or 0) or None


class StopWhenAsked(TrainerCallback):
    """Ends the training of a trainer whose record has got a signal.

    After the optimizer's step that is under way; of a step of several micro-batches the finished
    ones are dropped, and taken again by the resumed run.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_substep_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Between two micro-batches of a step."""
        several = self._trainer.accelerator.num_processes > 1  # which must do the same
        if self._trainer.record.signal is None or several or state.global_step == 0:
            return
        self._trainer.leave_step()
        control.should_save = self._trainer.saved_step != state.global_step
        control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """After a step; all processes stop after the same one."""
        agree(self._trainer.record)
        if self._trainer.record.signal is not None:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """After an evaluation, which may have been long."""
        self.on_step_end(args, state, control)
