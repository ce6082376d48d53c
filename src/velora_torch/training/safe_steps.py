"""Steps that survive what happens in long runs: numbers that overflow, memory that runs out,
signals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from velora_torch.sharding import whole
from velora_torch.training import processes
from velora_torch.training.nonfinite import (
    ADVICE,
    NonFiniteError,
    bad_weights,
    check_weights,
    first_nonfinite,
)
from velora_torch.training.out_of_memory import (
    OutOfMemoryError,
    holders,
    is_out_of_memory,
    release,
)
from velora_torch.training.sections import TrainSection
from velora_torch.training.step_start import StepStart

MAX_SKIPPED = 10


@dataclass
class _OpenStep:
    """A step whose update has not been made."""

    start: StepStart
    logged: Tensor
    """The trainer's sum of losses before it (0-d)."""
    tokens: Tensor | int
    """Tokens counted before it."""
    batches: list[tuple[dict[str, Any], Any]] = field(default_factory=list)
    """Its micro-batches so far, each with what its loss is divided by."""
    losses: list[Tensor] = field(default_factory=list)


class SafeSteps:
    """Put before `WholeCheckpoints` and a trainer that has a `record`."""

    args: Any
    state: Any
    control: Any
    model: Any
    optimizer: Any
    accelerator: Any
    record: Any
    saved_step: int
    policy: TrainSection | None = None
    """What to do; None trains on without looking."""
    say: Callable[[str], None]
    current_gradient_accumulation_steps: float
    forget_gradients: Callable[[], None]
    held_gradients: Callable[[], Iterator[Tensor]]
    last_part: bool = True
    """Whether the next backward pass is the last of its micro-batch."""
    parts: int = 1
    """Pieces into which a micro-batch is cut, each with a forward and backward pass of its own."""
    skipped: tuple[int, ...] = ()
    """Steps whose update was left out."""
    _open: _OpenStep | None = None

    def safety_state(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"parts": self.parts, "skipped": list(self.skipped)}

    def load_safety_state(self, state: dict[str, Any]) -> None:
        """Take what `safety_state` gave."""
        self.parts, self.skipped = int(state["parts"]), tuple(state["skipped"])

    def safety_notes(self) -> list[str]:
        """What readers of the results must know."""
        notes = []
        if self.skipped:
            steps = ", ".join(map(str, self.skipped))
            notes.append(f"not finite, so that nothing was learnt from them: steps {steps}")
        if self.parts > 1:
            notes.append(f"memory ran out: each micro-batch was cut into {self.parts}")
        return notes

    # ------------------------------------------------------------------ a micro-batch

    def training_step(self, model: Any, inputs: dict[str, Any], num_items: Any = None) -> Tensor:
        """One forward and backward pass, in smaller pieces where memory runs out."""
        if self.policy is None:
            return super().training_step(model, inputs, num_items)  # type: ignore[misc]
        if self._open is None:
            start = StepStart(self.model, self.forget_gradients)
            logged = self._tr_loss.clone()  # type: ignore[attr-defined]
            self._open = _OpenStep(start, logged, self.record.tokens + 0)
        self._open.batches.append((inputs, num_items))
        try:
            loss = self._in_parts(model, inputs, num_items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        else:
            self._open.losses.append(loss)
            return loss
        # What the failed pass holds is free only now that the error is gone.
        return self._again_in_smaller_parts(model, reason)

    def _again_in_smaller_parts(self, model: Any, reason: str) -> Tensor:
        """Take all of the step's micro-batches again, from the state that it began with."""
        assert self._open is not None
        while True:
            self._check_can_shrink(reason)
            self.parts *= 2
            self._open.start.restore()
            self.record.tokens = self._open.tokens + 0
            release()
            size, rest = (
                self.args.per_device_train_batch_size,
                self.args.gradient_accumulation_steps,
            )
            self.say(
                f"step {self.state.global_step + 1}: out of memory; each micro-batch of {size} is "
                f"cut into {self.parts} from here on, so that a step still has {size * rest}"
            )
            try:
                self._open.losses = [self._in_parts(model, *one) for one in self._open.batches]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            else:
                return self._open.losses[-1]

    def _check_can_shrink(self, reason: str) -> None:
        assert self._open is not None
        assert self.policy is not None
        inputs, _ = self._open.batches[-1]
        if self.policy.on_oom == "shrink":
            if self.accelerator.num_processes > 1:
                reason += "; on_oom: shrink works in one process, and this run has several"
            elif self.parts < rows_of(inputs):
                return
            else:
                reason += f"; a micro-batch of {rows_of(inputs)} can't be cut any further"
        saved_bytes = self.record.memory.saved_activations
        held = holders(self.model, self.held_gradients(), self.optimizer, saved_bytes)
        advice = "" if self.policy.on_oom == "shrink" else ", or set train.on_oom: shrink"
        number, step, self._open = self.state.global_step + 1, self._open, None
        saved = "" if self.accelerator.num_processes > 1 else self._save_before(step)
        raise OutOfMemoryError(
            f"step {number}: out of memory ({reason})\n{held}\n{saved}"
            f"Lower train.batch_size and raise train.accumulation by the same factor{advice}"
        )

    def _in_parts(self, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        rows = rows_of(inputs)
        take = super().training_step  # type: ignore[misc]
        if self.parts == 1 or rows < 2:
            return take(model, inputs, num_items)
        size = -(-rows // self.parts)
        accumulation = self.current_gradient_accumulation_steps
        losses = []
        try:
            for start in range(0, rows, size):
                part = _rows(inputs, rows, slice(start, start + size))
                # A loss that is a mean counts by its share of the rows.
                share = rows_of(part) / rows
                self.current_gradient_accumulation_steps = accumulation / share
                self.last_part = start + size >= rows
                losses.append(take(model, part, num_items))
        finally:
            self.current_gradient_accumulation_steps = accumulation
            self.last_part = True
        return torch.stack(losses).sum()

    # ------------------------------------------------------------------ before the update

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The trainer's own; called when all gradients of a step are there."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        norm = whole(norm) if isinstance(norm, Tensor) else norm
        step, self._open = self._open, None
        if step is not None and self.policy is not None and self._is_bad(step, norm):
            self._stop_or_skip(model, step, norm)
        return norm

    def _is_bad(self, step: _OpenStep, norm: Any) -> bool:
        """One look at the device in a step, at two numbers."""
        seen = torch.stack(step.losses).sum()
        if self.accelerator.scaler is None:  # a scaler leaves out steps that overflow, by itself
            seen = seen + torch.as_tensor(norm, device=seen.device)
        return processes.any_of(not bool(torch.isfinite(seen)))

    def _stop_or_skip(self, model: Any, step: _OpenStep, norm: Any) -> None:
        assert self.policy is not None
        number, tokens = self.state.global_step + 1, self.record.tokens + 0
        seen = f"the loss is {float(torch.stack(step.losses).sum()):g}"
        seen = f"step {number}: {seen}, the norm of the gradient {float(norm):g}"
        step.start.restore()
        weights = bad_weights(self.model)
        if weights:
            raise NonFiniteError(
                f"{seen}: {len(weights)} weights were not finite before it, such as {weights[0]}: "
                f"the update of an earlier step has overflowed. {ADVICE}"
            )
        found = first_nonfinite(
            self.model, lambda: [self._in_parts(model, *one) for one in step.batches]
        )
        self.record.tokens = tokens
        where, limit = f"{seen}: {found}", self.policy.max_skipped or MAX_SKIPPED
        if self.policy.on_nonfinite != "skip" or len(self.skipped) >= limit:
            spent = f"; {limit} steps were skipped already" if self.skipped else ""
            saved = self._save_before(step)
            raise NonFiniteError(
                f"{where}{spent}\nNothing of this step was applied. {saved}{ADVICE}"
            )
        self.skipped = (*self.skipped, number)
        self.say(f"{where}; skipped ({len(self.skipped)} of at most {limit})")
        step.start.restore()
        self._tr_loss.copy_(step.logged)  # type: ignore[attr-defined]
        if self.accelerator.scaler is None:
            # The optimizer sees no step: neither weights nor moments nor decay.
            self.accelerator.gradient_state._set_sync_gradients(False)

    # ------------------------------------------------------------------ saving

    def leave_step(self) -> None:
        """Forget a step that is not finished, as if it had not begun."""
        if self._open is not None:
            self._open.start.restore()
            self._open = None

    def _save_before(self, step: _OpenStep) -> str:
        """Save what the last finished step has left, where it is not saved; says so."""
        step.start.restore()
        number = self.state.global_step
        if number == 0:
            return ""
        if self.saved_step != number:
            self._save_checkpoint(self.model, None)
        return f"checkpoint-{number} has what was learnt before it.\n"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_weights(self.model, f"step {self.state.global_step}")
        super()._save_checkpoint(model, trial)  # type: ignore[misc]


def rows_of(inputs: dict[str, Any]) -> int:
    """Examples of a batch."""
    return next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.dim()), 1)


def _rows(inputs: dict[str, Any], rows: int, part: slice) -> dict[str, Any]:
    """Some examples of a batch."""
    return {
        name: value[part]
        if isinstance(value, Tensor) and value.dim() and len(value) == rows
        else value
        for name, value in inputs.items()
    }
