"""Where the memory of a training step goes, in bytes counted."""

from velora_torch.memory.count import StepBytes, measure_step, saved_bytes
from velora_torch.memory.ledger import Ledger, WhatIf, explain

__all__ = ["Ledger", "StepBytes", "WhatIf", "explain", "measure_step", "saved_bytes"]
