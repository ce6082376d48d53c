"""English technical prose that Debian ships, about 32 MB: text to pre-train small models on.

python-docs: the sources of Python's documentation (package python3.11-doc, 11 MB). linux-docs:
those of the kernel's, translations left out (package linux-doc-6.1, 21 MB). debian-docs: both.
"""

from __future__ import annotations

import difflib
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from velora_torch.training.assets import AssetError


@dataclass(frozen=True)
class _Manual:
    package: str
    folder: Path
    pattern: str
    without: str = ""
    """A folder at the top that is left out."""


_MANUALS = {
    "python-docs": _Manual(
        "python3.11-doc", Path("/usr/share/doc/python3.11/html/_sources"), "*.rst.txt"
    ),
    "linux-docs": _Manual(
        "linux-doc-6.1",
        Path("/usr/share/doc/linux-doc-6.1/Documentation"),
        "*.rst*",
        "translations",
    ),
}
MANUALS = (*_MANUALS, "debian-docs")


def load_manuals(name: str) -> Iterator[str]:
    """Yield the documents of one of `MANUALS`, in the order of their paths.

    Raises:
        AssetError: unknown name, or a package is not installed.
    """
    check_manuals(name)
    for path in manual_files(name):
        raw = path.read_bytes()
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
        yield text.decode("utf-8", errors="replace")


def check_manuals(name: str) -> None:
    """Raise `AssetError` for an unknown name, or if a Debian package is not installed."""
    if name not in MANUALS:
        near = difflib.get_close_matches(name, MANUALS, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(MANUALS)}"
        raise AssetError(f"no packaged text {name!r}; {hint}")
    missing = [manual.package for manual in _parts(name) if not manual.folder.is_dir()]
    if missing:
        raise AssetError(
            f"{name} needs Debian's {' and '.join(missing)}; install it with: "
            f"apt-get install {' '.join(missing)}"
        )


def manual_files(name: str) -> list[Path]:
    """The files of one of `MANUALS`, in the order in which they are read."""
    found = []
    for manual in _parts(name):
        files = (path for path in manual.folder.rglob(manual.pattern) if not path.is_symlink())
        kept = [p for p in files if p.relative_to(manual.folder).parts[0] != manual.without]
        found += sorted(kept, key=lambda path: path.as_posix())
    return found


def _parts(name: str) -> list[_Manual]:
    return list(_MANUALS.values()) if name == "debian-docs" else [_MANUALS[name]]
