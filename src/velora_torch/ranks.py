"""Several processes: every rank has the same vectors.

Averaged factors mean something only along one v. Random vectors are the same everywhere, since they
come from names, seeds and counters. Vectors that are chosen from data are chosen from the tokens of
all ranks: before a training forward in which layers are due, the model's forward runs once without
being differentiated, each rank notes what reaches those layers, and the notes are exchanged in one
collective call that every rank makes. So nothing waits inside of a layer, and a rank whose batch
skips a layer (an expert, say) holds nobody up.

What no rank's tokens have reached by then, or what is called otherwise than through the model that
was compressed, gets random vectors, which need no exchange.

Shapes: D features; rows stand for the tokens of all ranks: one mean, or a sample for ``svd``.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from velora_torch.config import Init
from velora_torch.subtoken.vectors import SVD_SAMPLE


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not several() or dist.get_rank() == 0


@dataclass
class Note:
    """What one rank saw of a layer's input."""

    rows: Tensor
    """(N, D): the sum of the tokens, or a sample of them."""
    tokens: int
    """How many tokens it stands for: the sum is divided by all ranks' number."""
    sampled: bool
    dtype: torch.dtype
    """Of the layer's vectors."""

    @classmethod
    def of(cls, x_TD: Tensor, init: Init, groups: int, dtype: torch.dtype) -> Note:
        """Note an input."""
        if init != "svd":
            return cls(x_TD.sum(0, keepdim=True, dtype=torch.float64), len(x_TD), False, dtype)
        ranks = dist.get_world_size() if several() else 1
        stride = -(-len(x_TD) * groups * ranks // SVD_SAMPLE)
        return cls(x_TD[:: max(stride, 1)].double(), len(x_TD), True, dtype)


@dataclass
class Gathered:
    """What the ranks saw of a layer's input, together."""

    rows: Tensor
    """(N, D): the mean token, or samples of all ranks."""
    dtype: torch.dtype


@dataclass
class _Gathering:
    notes: dict[str, Note] = field(default_factory=dict)


_gathering: _Gathering | None = None
_warned = False


def is_gathering() -> bool:
    """Whether a forward is running for what it shows alone."""
    return _gathering is not None


def choosing() -> bool:
    """Whether layers leave the choice of their vectors to what the ranks know together."""
    return _gathering is not None or several()


def offer(name: str, x_TD: Tensor, init: Init, groups: int, dtype: torch.dtype) -> bool:
    """Note the input of a layer that is to choose vectors from it.

    Returns:
        Whether vectors will be chosen at the end of the gathering. If not, there is none, and the
        layer has to take random ones.

    Raises:
        RuntimeError: while a graph is compiled, which cannot wait for other ranks.
    """
    global _warned
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"VeLoRA: {name!r} has no vectors yet, and a compiled graph can't choose them together "
            f"with other ranks: call velora_torch.choose_vectors(model, batch) on every rank first"
        )
    if _gathering is None:
        if not _warned:
            warnings.warn(
                f"VeLoRA: {name!r} was to choose vectors from the tokens of all ranks, but was "
                f"reached otherwise than by a forward of the model that was compressed; it takes "
                f"random ones, which are equal on every rank. To choose them from data, call the "
                f"model itself, or velora_torch.choose_vectors(model, batch) on every rank first.",
                stacklevel=2,
            )
        _warned = True
        return False
    if name not in _gathering.notes:  # a shared layer chooses at its first call
        _gathering.notes[name] = Note.of(x_TD.detach(), init, groups, dtype)
    return True


def gather(call: Callable[[], Any]) -> dict[str, Gathered]:
    """Run a forward pass, and give what it showed of the inputs of layers that are due.

    Every rank must call it. What the forward would have changed (buffers apart, which are the
    caller's affair) stays: random numbers are drawn again by the forward that follows, and
    nothing is kept for a backward pass.
    """
    global _gathering
    _gathering = gathering = _Gathering()
    try:
        with torch.random.fork_rng(), _nothing_saved():
            call()
    finally:
        _gathering = None
    return _exchange(gathering.notes)


@contextlib.contextmanager
def _nothing_saved() -> Iterator[None]:
    """Let autograd keep nothing: the graph of a gathering is never walked."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
        yield


def _exchange(notes: dict[str, Note]) -> dict[str, Gathered]:
    about = {
        n: (len(o.rows), o.rows.shape[1], o.tokens, o.sampled, o.dtype) for n, o in notes.items()
    }
    if not several():
        return {name: _joined(note.rows, note.tokens, note) for name, note in notes.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, about)
    names = sorted({name for one in everyone for name in one})
    parts, device = [], _device(notes)
    for name in names:
        told = [one[name] for one in everyone if name in one]
        sampled = told[0][3]
        rows = sum(one[0] for one in told) if sampled else 1
        part = torch.zeros(rows, told[0][1], dtype=torch.float64, device=device)
        if name in notes:
            first = sum(one[name][0] for one in everyone[: dist.get_rank()] if name in one)
            start = first if sampled else 0
            part[start : start + len(notes[name].rows)] = notes[name].rows
        parts.append(part)
    if not parts:
        return {}
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat)
    found = {}
    for name, part in zip(names, flat.split([p.numel() for p in parts]), strict=True):
        told = [one[name] for one in everyone if name in one]
        note = Note(part.view(-1, told[0][1]), 0, told[0][3], told[0][4])
        found[name] = _joined(note.rows, sum(one[2] for one in told), note)
    return found


def _joined(rows: Tensor, tokens: int, note: Note) -> Gathered:
    return Gathered((rows if note.sampled else rows / tokens), note.dtype)


def _device(notes: dict[str, Note]) -> torch.device:
    """Where the backend wants its tensors: where the notes are, the same kind on every rank."""
    for note in notes.values():
        return note.rows.device
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def fingerprint(vectors: Tensor, counters: Any) -> str:
    """A hash of the bits of a tensor, and of what else is to be the same on every rank."""
    content = vectors.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content + repr(counters).encode()).hexdigest()


def differing(hashes: dict[str, str]) -> list[str]:
    """Names whose hash is another, or missing, on another rank; the same list on every rank."""
    if not several():
        return []
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, hashes)
    names = dict.fromkeys(name for one in everyone for name in one)
    return [name for name in names if len({one.get(name) for one in everyone}) > 1]


def union(names: Iterable[str]) -> list[str]:
    """Names that any rank gives, in the order of the first that does; every rank must ask."""
    own = list(names)
    if not several():
        return own
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return list(dict.fromkeys(name for one in everyone for name in one))
