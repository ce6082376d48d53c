"""The manifest of a checkpoint: SHA-256 of every file in it, written last.

A checkpoint without one was not written to its end; one whose files differ from it is damaged.
Both are known before anything in the checkpoint is loaded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from velora_torch.atomic import write_whole

MANIFEST = "velora_manifest.json"
FORMAT = "velora-torch/manifest/1"


def write_manifest(folder: Path) -> None:
    """Describe the files that are in a folder now, those in its folders included.

    Raises:
        OSError: a file can't be read, or the manifest not be written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in paths
    }
    text = {"format": FORMAT, "sha256": _hash_of(files), "files": files}
    write_whole(folder / MANIFEST, json.dumps(text, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; None: it is whole.

    Reads every byte of it. What was added later does not count.
    """
    try:
        text = json.loads((folder / MANIFEST).read_bytes())
        files: dict[str, Any] = text["files"]
        if text["format"] != FORMAT:
            return f"its {MANIFEST} has format {text['format']!r}; this version reads {FORMAT!r}"
        if text["sha256"] != _hash_of(files):
            return f"its {MANIFEST} is damaged"
        expected = {name: (int(one["bytes"]), one["sha256"]) for name, one in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its writing was cut off, or an older version wrote it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} is damaged ({error!r})"
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"its {MANIFEST} names {name}, which is outside of it"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and had {size:,}"
    for name, (_, checksum) in expected.items():
        if _hash(folder / name) != checksum:
            return f"{name} is damaged: its checksum is not the one that was saved"
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(files: object) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
