"""A corpus as one long row of tokens on the disk, and windows of it in a fixed order.

Documents follow each other, each ended by the end-of-text token; windows of one length are cut from
the row without padding, so that every token counts. Which window comes when depends on the seed and
on its place in the run alone: a resumed run goes on in mid-stream with the window that is next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from velora_torch.atomic import keep_folder
from velora_torch.training.sources import DataError

FILE, ABOUT = "tokens.bin", "about.json"
BATCH = 256
"""Documents that the tokenizer gets at a time; it works on them in parallel."""


class TokenFile:
    """A row of tokens on the disk, (N,), read without being loaded."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self.documents: int = about["documents"]
        self.digest: str = about["digest"]
        """Of the tokens, so that runs on other text are told apart."""
        path = folder / FILE
        kind = np.dtype(about["dtype"])
        if path.stat().st_size != about["tokens"] * kind.itemsize:
            raise DataError(
                f"{path} has {path.stat().st_size:,} bytes where {about['tokens']:,} tokens were "
                f"written: it was cut or changed. Remove {folder}, and it is made again"
            )
        self.tokens_N = np.memmap(path, dtype=kind, mode="r")

    def __len__(self) -> int:
        return len(self.tokens_N)


def tokenise(
    texts: Callable[[], Iterable[str]],
    tokenizer: Any,
    folder: Path,
    limit: int | None,
    say: Callable[[str], None],
) -> TokenFile:
    """Turn documents into a token file, which is kept and taken again.

    Args:
        texts: opens the documents; not called where the file is there.
        tokenizer: one of transformers' fast ones.
        folder: where the file lies; written whole or not at all.
        limit: tokens after which no further document is read; None reads all.
        say: shows a line now and then.
    """
    keep_folder(folder, ABOUT, lambda work: _write(texts(), tokenizer, work, limit, say))
    return TokenFile(folder)


def _write(
    texts: Iterable[str],
    tokenizer: Any,
    folder: Path,
    limit: int | None,
    say: Callable[[str], None],
) -> None:
    kind = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    end = tokenizer.eos_token_id
    count = documents = 0
    told = 10_000_000
    digest = hashlib.sha256()
    with (folder / FILE).open("wb") as file:
        source = iter(texts)
        while batch := list(islice(source, BATCH)):
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            for ids in encoded:
                row = np.asarray([*ids, end], dtype=kind).tobytes()
                file.write(row)
                digest.update(row)
                count += len(ids) + 1
            documents += len(batch)
            if count >= told:
                say(f"{count / 1e6:,.0f} million tokens")
                told += 10_000_000
            if limit is not None and count >= limit:
                break
    about = {
        "tokens": count,
        "documents": documents,
        "dtype": kind.name,
        "digest": digest.hexdigest()[:16],
    }
    (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")


def key_of(**parts: Any) -> str:
    """A name for a token file that changes with whatever its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows of a token file, as examples of a causal language model.

    Args:
        file: the tokens.
        length: L, tokens of a window.
        count: windows in all; where the file has fewer, it is passed through again, each time in an
            order of its own. None takes every window once.
        seed: of the order; None keeps that of the file.

    Raises:
        DataError: the file has not one window.
    """

    def __init__(
        self, file: TokenFile, length: int, count: int | None = None, seed: int | None = None
    ) -> None:
        self.windows = len(file) // length
        if not self.windows:
            raise DataError(
                f"the text has {len(file):,} tokens, and data.max_length = {length} are needed at "
                f"least; give more text, or a smaller data.max_length"
            )
        self._tokens, self._length, self._seed = file.tokens_N, length, seed
        self._count = self.windows if count is None else count
        self._order: tuple[int, np.ndarray[Any, Any]] | None = None

    def __len__(self) -> int:
        """Number of windows, passes after the first included."""
        return self._count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """input_ids and labels, each (L,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = self._place(index) * self._length
        ids = torch.from_numpy(self._tokens[start : start + self._length].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def _place(self, index: int) -> int:
        """Place in the file of a window of the run."""
        number, within = divmod(index, self.windows)
        if self._seed is None:
            return within
        if self._order is None or self._order[0] != number:
            order = np.random.default_rng((self._seed, number)).permutation(self.windows)
            self._order = number, order
        return int(self._order[1][within])


def spread(windows: TokenWindows, count: int | None) -> Subset[dict[str, torch.Tensor]]:
    """So many of the windows, at equal distances and in their order; all for None."""
    most = len(windows)
    kept = most if count is None else min(count, most)
    return Subset(windows, [index * most // kept for index in range(kept)])
