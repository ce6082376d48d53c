"""The names that are promised, and what importing the package must not do."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import velora_torch

PROMISED = [
    "VeloraConfig",
    "check_ranks",
    "choose_vectors",
    "compress",
    "export_lora",
    "fold",
    "memory",
    "restore",
    "summary",
]


def test_public_names_are_exactly_the_promised_ones() -> None:
    assert velora_torch.__all__ == PROMISED
    assert sorted(velora_torch.__all__) == velora_torch.__all__
    assert all(hasattr(velora_torch, name) for name in PROMISED)
    assert isinstance(velora_torch.memory, types.ModuleType)


def test_recompute_is_there_though_not_promised() -> None:
    assert callable(velora_torch.recompute)
    assert {"explain", "plan", "simulate"} <= set(velora_torch.memory.__all__)


def test_every_name_is_found_and_listed() -> None:
    for module in (velora_torch, velora_torch.memory):
        assert set(module.__all__) <= set(dir(module))
        assert all(getattr(module, name) is not None for name in module.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'compres'"):
            module.compres  # noqa: B018


def test_any_module_can_be_the_first() -> None:
    """No module needs that another one has been imported before it."""
    code = """
import importlib, sys
for module in ("model", "memory", "memory.ledger.ledger", "layers", "config"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "velora_torch"]:
        del sys.modules[name]
    importlib.import_module(f"velora_torch.{module}")
    sys.modules["velora_torch"].compress
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_needs_no_pytorch() -> None:
    code = "import sys, velora_torch.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert velora_torch.__version__ == version("velora-torch")


def test_importing_needs_no_extra_and_leaves_the_gpu_alone() -> None:
    code = (
        "import sys, json, torch, velora_torch\n"
        "print(json.dumps([sorted(sys.modules), torch.cuda.is_initialized()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, initialised = json.loads(done.stdout)
    loaded = {name.partition(".")[0] for name in modules}
    extras = {
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "bitsandbytes",
        "trl",
        "pydantic",
        "yaml",
        "typer",
        "rich",
        "jinja2",
        "matplotlib",
        "tensorboard",
        "psutil",
        "gguf",
    }
    assert "velora_torch" in loaded
    assert not loaded & extras
    assert not initialised


def test_every_dependency_has_a_lower_bound_that_is_tested() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [Requirement(r) for group in (project["dependencies"], *extras) for r in group]
    lines = (root / "constraints-oldest.txt").read_text().splitlines()
    tested = {r.name: r for line in lines if line[0] != "#" for r in [Requirement(line)]}
    for requirement in asked:
        assert [s.operator for s in requirement.specifier] == [">="], requirement
        (exact,) = tested[requirement.name.lower()].specifier
        assert requirement.specifier.contains(exact.version), requirement
