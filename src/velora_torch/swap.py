"""Modules whose class is changed in place, so that name, hooks and ``state_dict`` keys stay."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

SwappedT = TypeVar("SwappedT", bound="Swapped")

_CLASSES: dict[tuple[type[Swapped], type[nn.Module]], type[Swapped]] = {}


class Swapped(nn.Module):
    """Mixed in before the class of a plain module; adds no attribute to the module itself."""

    plain_class: type[nn.Module]
    kind: str
    """What :func:`velora_torch.recomputation.recomputed` calls it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class, since the class of the module is made at run time."""
        return _blank, (self.mixin(), self.plain_class), self.__dict__.copy()

    @classmethod
    def mixin(cls) -> type[Swapped]:
        """The class that was mixed in."""
        return cls.__mro__[1]


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Mix a class into one module."""
    module.__class__ = _swapped_class(mixin, type(module))


def swap_back(module: Swapped) -> None:
    """Make a module plain again."""
    module.__class__ = module.plain_class  # type: ignore[assignment]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has when nothing is mixed in."""
    return module.plain_class if isinstance(module, Swapped) else type(module)


def _swapped_class(mixin: type[Swapped], original: type[nn.Module]) -> type[Swapped]:
    key = (mixin, original)
    if key not in _CLASSES:
        body = {"__module__": __name__, "plain_class": original}
        _CLASSES[key] = type(f"{mixin.__name__}{original.__name__}", (mixin, original), body)
    return _CLASSES[key]


def _blank(mixin: type[Swapped], original: type[nn.Module]) -> Swapped:
    kind = _swapped_class(mixin, original)
    return kind.__new__(kind)
