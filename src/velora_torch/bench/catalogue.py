"""All benches by name."""

from __future__ import annotations

from velora_torch.bench.alpaca import ALPACA
from velora_torch.bench.glue import GLUE
from velora_torch.bench.grid import Bench
from velora_torch.bench.pretrain.protocol import PRETRAIN
from velora_torch.bench.vtab import VTAB

BENCHES: dict[str, Bench] = {bench.name: bench for bench in (VTAB, GLUE, ALPACA, PRETRAIN)}
"""What `velora bench` knows."""
