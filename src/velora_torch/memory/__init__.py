"""Where the memory of a training step goes, in bytes counted."""

from velora_torch.memory.count import StepBytes, measure_step, saved_bytes

__all__ = ["StepBytes", "measure_step", "saved_bytes"]
