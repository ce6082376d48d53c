"""Modules whose class is changed in place, so that name, hooks and ``state_dict`` keys stay."""

from __future__ import annotations

from typing import Any

from torch import nn

_CLASSES: dict[tuple[type[Mixed], type[nn.Module]], type[Mixed]] = {}


class Mixed(nn.Module):
    """Mixed in before the class of a plain module, while the program runs."""

    plain_class: type[nn.Module]
    """What the module was before."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class, since the class of the module is made at run time."""
        return _blank, (self.mixin(), self.plain_class), self.__dict__.copy()

    @classmethod
    def mixin(cls) -> type[Mixed]:
        """The class that was mixed in."""
        return cls.__mro__[1]


class Swapped(Mixed):
    """A module that gains nothing but another forward; adds no attribute to it."""

    kind: str
    """What :func:`velora_torch.recomputation.recomputed` calls it."""


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Mix a class into one module."""
    module.__class__ = mixed_class(mixin, type(module))


def swap_back(module: Swapped) -> None:
    """Make a module plain again."""
    module.__class__ = module.plain_class  # type: ignore[assignment]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has when nothing is mixed in."""
    return module.plain_class if isinstance(module, Swapped) else type(module)


def mixed_class(mixin: type[Mixed], original: type[nn.Module]) -> type[Mixed]:
    """The class of a module of a plain class with something mixed in: one for each pair."""
    key = (mixin, original)
    if key not in _CLASSES:
        body = {"__module__": __name__, "plain_class": original}
        _CLASSES[key] = type(f"{mixin.__name__}{original.__name__}", (mixin, original), body)
    return _CLASSES[key]


def _blank(mixin: type[Mixed], original: type[nn.Module]) -> Mixed:
    kind = mixed_class(mixin, original)
    return kind.__new__(kind)
