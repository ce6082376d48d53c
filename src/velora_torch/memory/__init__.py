"""Where the memory of a training step goes: counted, explained, simulated, planned."""

from typing import TYPE_CHECKING

from velora_torch import lazy

if TYPE_CHECKING:
    from velora_torch.memory.count import StepBytes, measure_step, saved_bytes
    from velora_torch.memory.ledger.ledger import Ledger, WhatIf, explain
    from velora_torch.memory.planner.plan import Plan, plan
    from velora_torch.memory.simulator.setup import Setup
    from velora_torch.memory.simulator.simulate import simulate
    from velora_torch.memory.simulator.simulation import Simulation

__all__ = [
    "Ledger",
    "Plan",
    "Setup",
    "Simulation",
    "StepBytes",
    "WhatIf",
    "explain",
    "measure_step",
    "plan",
    "saved_bytes",
    "simulate",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "Ledger": "ledger.ledger",
        "Plan": "planner.plan",
        "Setup": "simulator.setup",
        "Simulation": "simulator.simulation",
        "StepBytes": "count",
        "WhatIf": "ledger.ledger",
        "explain": "ledger.ledger",
        "measure_step": "count",
        "plan": "planner.plan",
        "saved_bytes": "count",
        "simulate": "simulator.simulate",
    },
)
