"""Adapters that PEFT lacks, SSF and Hydra, and two baselines that add nothing.

Adapters are ordinary modules in the model, so :func:`velora_torch.compress` sees them like any
other layer. Before saving a plain checkpoint, :func:`merge_adapters`; to save the adapters alone,
:func:`adapter_state_dict`.
"""

from velora_torch.adapters.hydra import Hydra, add_hydra
from velora_torch.adapters.merge import merge_adapters
from velora_torch.adapters.probes import bitfit, linear_probe
from velora_torch.adapters.ssf import add_ssf
from velora_torch.adapters.state import adapter_state_dict, load_adapter_state_dict
from velora_torch.heads import find_head
from velora_torch.layers.scale_shift import ScaleShift

__all__ = [
    "Hydra",
    "ScaleShift",
    "adapter_state_dict",
    "add_hydra",
    "add_ssf",
    "bitfit",
    "find_head",
    "linear_probe",
    "load_adapter_state_dict",
    "merge_adapters",
]
