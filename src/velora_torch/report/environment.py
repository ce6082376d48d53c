"""The machine and the versions that a result was measured with: no host name, no user, no path."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from velora_torch.report.results import MachineInfo

if TYPE_CHECKING:
    import torch

_DISTRIBUTIONS = (
    "velora-torch",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "trl",
    "bitsandbytes",
    "safetensors",
    "numpy",
)
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def machine_info(device: str | torch.device = "cpu") -> MachineInfo:
    """CPU, cores and memory that this process may use, and the name of the training `device`."""
    import torch

    from velora_torch import half_products

    info = MachineInfo(
        cpu=_cpu_model(),
        cores=_cores(),
        memory_bytes=_memory_bytes(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        device=str(device),
        half_products="float32" if half_products.are_float32() else "native",
    )
    if str(device).startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        info.device, info.device_memory_bytes = properties.name, properties.total_memory
    return info


def version_info() -> dict[str, str]:
    """Versions of Python and of the installed packages that a training run depends on."""
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    """Cores this process may run on, which a container can make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # absent on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    """The machine's memory, or a container's limit where that is less."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _CGROUP_LIMITS:
        if path.is_file():
            limit = path.read_text(encoding="ascii").strip()
            if limit.isdigit():
                total = min(total, int(limit))
    return total
