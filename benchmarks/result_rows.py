"""The benches' committed rows, as the makers of tables read them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from velora_torch.bench.catalogue import BENCHES
from velora_torch.bench.collect import collect
from velora_torch.bench.grid import Finished

RESULTS = Path(__file__).parent / "results"
SCALE = "local"


@cache
def finished(bench: str, scale: str = SCALE, folder: str | None = None) -> Finished:
    """Rows and times: of the folder with the bench's name, or of another."""
    found, _stale = collect(BENCHES[bench], scale, RESULTS / (folder or bench))
    return found
