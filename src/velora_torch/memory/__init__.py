"""Where the memory of a training step goes, in bytes counted."""

from velora_torch.memory.count import StepBytes, measure_step, saved_bytes
from velora_torch.memory.ledger import Ledger, WhatIf, explain
from velora_torch.memory.plan import Plan, plan

__all__ = [
    "Ledger",
    "Plan",
    "StepBytes",
    "WhatIf",
    "explain",
    "measure_step",
    "plan",
    "saved_bytes",
]
