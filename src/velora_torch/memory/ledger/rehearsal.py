"""One training forward of a copy of a model, as often as one likes: the model stays as it is."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree

from velora_torch.memory.fake import FakeWorld, skeleton
from velora_torch.memory.freed import disarm
from velora_torch.memory.ledger.saves import Saved, record

Loss = Callable[[nn.Module, Any], Tensor]
Prepare = Callable[[nn.Module], None]


class Rehearsal:
    """Runs real copies on the model's own device."""

    def __init__(self, model: nn.Module, batch: Any, loss: Loss | None) -> None:
        self.model = model
        self._batch, self._loss = batch, loss

    def saves(self, prepare: Prepare | None = None) -> list[Saved]:
        """What a training forward of a new copy saves; ``prepare`` may change the copy before."""
        with torch.inference_mode(False), torch.enable_grad():
            return self._saves(prepare)

    def _saves(self, prepare: Prepare | None) -> list[Saved]:
        model = disarm(copy.deepcopy(self.model)).train()
        if prepare is not None:
            prepare(model)
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(sorted(devices, key=str)):
            return record(model, lambda: self._run(model, self._batch))

    def _run(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """The loss, and with it whatever output it was made from."""
        if self._loss is not None:
            loss, output = self._loss(model, batch), None
            if not isinstance(loss, Tensor) or loss.dim():
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
                raise ValueError(f"loss(model, batch) must return a 0-d tensor, got {got}")
        else:
            args, kwargs = arguments(batch)
            output = model(*args, **kwargs)
            loss = _default_loss(output)
        if not loss.requires_grad:
            raise ValueError(
                "no gradient flows from the loss to any parameter, so nothing is saved: the model "
                "is frozen, or its output is detached. Set requires_grad where it should train"
            )
        return loss, output


class FakeRehearsal(Rehearsal):
    """Runs copies on fake tensors, each in a world of its own."""

    def __init__(self, model: nn.Module, batch: Any, loss: Loss | None) -> None:
        # Without data, so that neither memory is held nor later changes of the model are seen.
        super().__init__(skeleton(model), pytree.tree_map(_off_fake, batch), loss)

    def _saves(self, prepare: Prepare | None) -> list[Saved]:
        world = FakeWorld()
        model, batch = disarm(world.model(self.model)).train(), world.batch(self._batch)
        with torch.random.fork_rng([]), world, _clear_errors(type(model).__name__):
            if prepare is not None:
                prepare(model)
            return record(model, lambda: self._run(model, batch))


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch stands for.

    Raises:
        ValueError: it is neither a mapping nor a tuple nor a tensor.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple):
        return batch, {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise ValueError(
        f"a batch is a dict (keyword arguments of the model's forward), a tuple (positional "
        f"arguments) or one tensor, got {type(batch).__name__}"
    )


def check_arguments(model: nn.Module, batch: Any) -> None:
    """Check that a batch names what the model's forward takes.

    Raises:
        ValueError: it does not; the message lists the forward's parameters.
    """
    args, kwargs = arguments(batch)
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"the batch does not match the forward of {type(model).__name__}: {error}. Its "
            f"parameters are {', '.join(signature.parameters)}"
        ) from None


def _default_loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.sum()
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    sums = [t.sum() for t in tensors if t.is_floating_point()]
    if not sums:
        raise ValueError(
            f"the model's output, a {type(output).__name__}, has neither a loss nor floating-point "
            f"tensors to sum up: give explain a loss, a function of the model and the batch"
        )
    trained = [value for value in sums if value.requires_grad]
    return sum(trained[1:], trained[0]) if trained else sums[0]


def _off_fake(value: Any) -> Any:
    """A tensor of another fake world on ``meta``, from where it can go into any world."""
    if not isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


_INSTEAD = "explain(..., on='real') runs a real copy of the model instead"


@contextmanager
def _clear_errors(model: str) -> Iterator[None]:
    """Say which operator fake tensors cannot run, and what to do."""
    torch_says_it_too = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, torch_says_it_too.disabled = torch_says_it_too.disabled, True
    try:
        yield
    except UnsupportedOperatorException as error:
        raise ValueError(
            f"{model} uses the operator {error.func}, which has no fake implementation: register "
            f"one (torch.library.register_fake), or {_INSTEAD}"
        ) from error
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"{model} looks at the numbers in a tensor (operator {error.func}), and fake tensors "
            f"have none: {_INSTEAD}"
        ) from error
    except RuntimeError as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"{model} fails on fake tensors: {reason}. If it runs on real ones: {_INSTEAD}"
        ) from error
    except AssertionError as error:
        if "convert all Tensors to FakeTensors" not in str(error):
            raise
        raise ValueError(
            f"{model} or the loss uses a tensor that is neither a parameter nor a buffer nor an "
            f"attribute of a module, so it has no fake form: register it as a buffer, or {_INSTEAD}"
        ) from error
    finally:
        torch_says_it_too.disabled = was_disabled
