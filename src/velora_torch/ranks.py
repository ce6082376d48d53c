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
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from velora_torch.config import Init
from velora_torch.subtoken.vectors import SVD_SAMPLE

Value = TypeVar("Value")


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not several() or dist.get_rank() == 0


@dataclass(frozen=True)
class About:
    """What every rank must know of another one's note."""

    rows: int
    features: int
    """D."""
    tokens: int
    """How many tokens the note stands for."""
    sampled: bool
    """Whether its rows are some of the tokens, or one is the sum of all."""
    dtype: torch.dtype
    """Of the layer's vectors."""


@dataclass(frozen=True)
class Note:
    """What one rank saw of a layer's input."""

    rows: Tensor
    """(N, D), in float64."""
    about: About

    @classmethod
    def of(cls, x_TD: Tensor, init: Init, groups: int, dtype: torch.dtype) -> Note:
        """Note an input."""
        sampled = init == "svd"
        if sampled:
            world = dist.get_world_size() if several() else 1
            stride = -(-len(x_TD) * groups * world // SVD_SAMPLE)
            rows = x_TD[:: max(stride, 1)].double()
        else:
            rows = x_TD.sum(0, keepdim=True, dtype=torch.float64)
        return cls(rows, About(len(rows), x_TD.shape[1], len(x_TD), sampled, dtype))


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
    everyone = _everyones({name: note.about for name, note in notes.items()})
    rank = dist.get_rank() if several() else 0
    shapes, dtypes, parts = {}, {}, []
    for name in sorted({name for one in everyone for name in one}):
        told = [one[name] for one in everyone if name in one]
        first = told[0]
        rows = sum(one.rows for one in told) if first.sampled else 1
        part = torch.zeros(rows, first.features, dtype=torch.float64, device=_device(notes))
        if name in notes and first.sampled:  # after the rows of the ranks before
            start = sum(one[name].rows for one in everyone[:rank] if name in one)
            part[start : start + notes[name].about.rows] = notes[name].rows
        elif name in notes:
            part[:] = notes[name].rows / sum(one.tokens for one in told)
        shapes[name], dtypes[name] = part.shape, first.dtype
        parts.append(part.flatten())
    if not parts:
        return {}
    flat = torch.cat(parts)
    if several():
        dist.all_reduce(flat)
    sums = flat.split([part.numel() for part in parts])
    return {
        name: Gathered(part.view(shape), dtypes[name])
        for (name, shape), part in zip(shapes.items(), sums, strict=True)
    }


def _everyones(value: Value) -> list[Value]:
    """What each rank gives, in their order; every rank must ask."""
    if not several():
        return [value]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told


def _device(notes: dict[str, Note]) -> torch.device:
    """Where the backend wants its tensors: where the notes are, the same kind on every rank."""
    for note in notes.values():
        return note.rows.device
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def fingerprint(tensor: Tensor, counters: Any) -> str:
    """A hash of the bits of a tensor, and of what else is to be the same on every rank."""
    content = tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content + repr(counters).encode()).hexdigest()


def differing(hashes: dict[str, str]) -> list[str]:
    """Names whose hash is another, or missing, on another rank; the same list on every rank."""
    everyone = _everyones(hashes)
    names = dict.fromkeys(name for one in everyone for name in one)
    return [name for name in names if len({one.get(name) for one in everyone}) > 1]


def union(names: Iterable[str]) -> list[str]:
    """Names that any rank gives, in the order of the first that does; every rank must ask."""
    everyone = _everyones(list(names))
    return list(dict.fromkeys(name for one in everyone for name in one))
