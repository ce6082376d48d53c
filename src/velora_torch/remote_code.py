"""Code that comes with a model: it runs only where the user of a command has said so.

A recipe cannot say it: recipes are passed around, and reading one must not run anything. Where it
is not said, a model of an architecture that transformers knows is built by transformers' own code,
and any other is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FLAG = "--trust-remote-code"
_CONFIGURATIONS = ("config.json", "tokenizer_config.json")
_trusted = False


class RemoteCodeError(ValueError):
    """A model needs code of its own, which was not allowed to run."""


def trust_remote_code(trusted: bool) -> bool:
    """Let models bring code in this process, or not, which is the default. Returns ``trusted``."""
    global _trusted
    _trusted = trusted
    return trusted


def trust() -> dict[str, Any]:
    """Keyword arguments for the ``from_pretrained`` of transformers' Auto classes.

    It is never left open: transformers would ask the user, in the middle of a run.
    """
    return {"trust_remote_code": _trusted}


def check_code(folder: Path) -> None:
    """Refuse a model folder that cannot be loaded without running code that lies in it.

    Raises:
        RemoteCodeError: it needs such code, and `FLAG` was not given.
    """
    if _trusted:
        return
    for name in _CONFIGURATIONS:
        files = _code_of(folder / name)
        if files:
            raise RemoteCodeError(_message(str(folder), ", ".join(files)))


def explain(name: str, error: Exception) -> str:
    """What is wrong with a model that transformers could not load, in one line."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return _message(name, "its own modeling code")
    return text.partition("\n")[0]


def _message(name: str, files: str) -> str:
    return (
        f"the model {name} needs Python code that comes with it ({files}), and it is not run "
        f"unless you say so: read that code, and if you trust it, add {FLAG} to the command"
    )


def _code_of(path: Path) -> list[str]:
    """Files that a configuration names for a class that transformers does not have."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []  # whoever loads it says what is wrong
    if not isinstance(content, dict) or not isinstance(content.get("auto_map"), dict):
        return []
    if path.name == "config.json" and _is_known(content.get("model_type")):
        return []
    if path.name != "config.json" and _has_tokenizer(content.get("tokenizer_class")):
        return []
    named: set[str] = set()
    for classes in content["auto_map"].values():
        for reference in classes if isinstance(classes, list) else [classes]:
            if isinstance(reference, str):
                module = reference.rpartition("--")[2].partition(".")[0]
                named.add(f"{module}.py")
    return sorted(named)


def _is_known(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _has_tokenizer(name: Any) -> bool:
    import transformers

    return isinstance(name, str) and hasattr(transformers, name)
