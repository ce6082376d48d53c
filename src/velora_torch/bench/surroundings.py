"""When, where and with what a session of timing has been: the same fields for all its rows."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from velora_torch.report.environment import machine_info, version_info


def surroundings() -> dict[str, Any]:
    """Fields of a row: `session` (the date), `threads`, `machine` and `versions`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "session": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "machine": dataclasses.asdict(machine_info(device)),
        "versions": version_info(),
    }
