"""The files that a checkpoint's index names: they lie in its own folder."""

from __future__ import annotations

import json
from pathlib import Path


def check_shards(folder: Path) -> None:
    """Refuse a folder whose index of weights names a file elsewhere, or cannot be read.

    The loaders of weights take such a name as it is.

    Raises:
        ValueError: names the index, and the file.
    """
    for index in sorted(folder.glob("*.index.json")):
        try:
            content = json.loads(index.read_bytes())
            names = set(content["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); use another checkpoint") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\\" in name:
                raise ValueError(
                    f"{index} names {str(name)[:80]!r}, which is not a file of its own folder: "
                    f"weights are not read from elsewhere"
                )
