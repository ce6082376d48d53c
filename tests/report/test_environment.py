import dataclasses
import platform
import socket

import torch

from velora_torch.report.environment import _cpu_model, machine_info, version_info


def test_machine_says_what_was_used_and_not_whose_it_is():
    info = machine_info("cpu")
    assert info.cpu
    assert info.cores >= 1
    assert info.instructions == torch.backends.cpu.get_cpu_capability()
    assert info.memory_bytes is None or info.memory_bytes > 2**28
    assert (info.device, info.device_memory_bytes) == ("cpu", None)
    assert socket.gethostname() not in map(str, dataclasses.asdict(info).values())


def test_cpu_model_comes_from_the_system(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example CPU @ 2.5GHz\n")
    assert _cpu_model(cpuinfo) == "Example CPU @ 2.5GHz"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50\n")
    assert _cpu_model(cpuinfo) in (platform.processor(), platform.machine())


def test_versions_name_what_is_installed():
    versions = version_info()
    assert versions["python"] == platform.python_version()
    assert {"torch", "velora_torch"} <= versions.keys()
    assert all(isinstance(version, str) and version for version in versions.values())
