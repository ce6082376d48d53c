"""Checkpoints that are there as a whole or not at all, whenever the process ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from velora_torch.atomic import write_whole
from velora_torch.choosing import check_ranks
from velora_torch.training.manifest import write_manifest
from velora_torch.training.staging import STAGING, clear, explained, place, rotate, step_of

SAFETY_FILE = "velora_safety.json"
"""What a run has learnt about itself: see `safe_steps.py`."""


class WholeCheckpoints:
    """Put before `Trainer` or a class of its kind.

    A checkpoint is written into a folder of its own, described by a manifest, put on the disk, and
    then moved to its place in one step. Older ones are removed after that.
    """

    args: Any
    model: Any
    state: Any
    control: Any
    accelerator: Any
    before_save: Callable[[], None] | None = None
    """Called before a checkpoint is written, by the process that writes."""
    saved_step: int = 0
    """Steps before the newest checkpoint that this run has written, or gone on from."""
    _staging: Path | None = None

    def safety_state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps for `load_safety_state`."""
        return {}

    def load_safety_state(self, state: dict[str, Any]) -> None:
        """Take what `safety_state` gave."""

    def _get_output_dir(self, trial: Any) -> str:
        if self._staging is not None:
            return str(self._staging)
        found: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return found

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_ranks(self.model)
        output, writes = Path(self.args.output_dir), self.args.should_save
        name = f"checkpoint-{self.state.global_step}"
        with explained(output, f"the checkpoint of step {self.state.global_step}"):
            if writes:
                clear(output)
                if self.before_save is not None:
                    self.before_save()
            self.accelerator.wait_for_everyone()
            self._staging = output / STAGING
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            if writes:
                folder = output / STAGING / name
                write_whole(folder / SAFETY_FILE, json.dumps(self.safety_state()))
                write_manifest(folder)
                place(output, name)
                rotate(output, output / name, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self.saved_step = self.state.global_step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run that was killed after its last step has nothing to train when it is resumed."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        folder = Path(resume_from_checkpoint)
        self.saved_step = step_of(folder)
        self.load_safety_state(json.loads((folder / SAFETY_FILE).read_bytes()))
