"""Whether a saved state fits the layers that are to take it: looked at before any of them changes.

The checksum tells damage; this tells a state that was written by something else, or tampered with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from velora_torch.layers import CompressedLayer
from velora_torch.layers.adapter import COUNTERS, CompressedAdapter

DIRECTIONS = ("v", "sign")
_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "drawn": (bool,),
    "due": (bool,),
    "pending": (bool,),
    "lost": (str, type(None)),
}
"""Types of counters; all others are whole numbers from 0 on."""


def check_layer_state(
    name: str, layer: CompressedLayer, described: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Refuse counters or tensors that the layer cannot take.

    Raises:
        ValueError: says which, and what it should be.
    """
    for key in layer.velora.counters():
        _check_counter(name, key, described)
    coefficients = layer._parameters["coef"]
    shape = None if coefficients is None else tuple(coefficients.shape)
    vectors = tuple(layer.velora_vectors.shape)
    expected: dict[str, tuple[int, ...] | None] = {
        "vectors": vectors,
        "delta": shape,
        "running": vectors,
        "turn": vectors[:1],
        "sign_turn": vectors[:1],
        "coef": shape,
    }
    if layer.foldable:
        expected["base"] = tuple(layer.raw_weight.shape)
    _check_tensors(name, expected, ("vectors",), tensors)


def check_adapter_state(
    name: str,
    adapter: CompressedAdapter,
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Refuse sites or tensors that the adapter cannot take.

    Raises:
        ValueError: says which, and what it should be.
    """
    _check_counter(name, "steps", described)
    sites = described.get("sites")
    if not isinstance(sites, dict):
        raise ValueError(f"the state of {name!r}: 'sites' is {_shown(sites)}, not an object")
    state = adapter.velora_adapter
    for key, site in sites.items():
        where = f"{name}.{key}"
        if not isinstance(site, dict) or site.keys() != set(COUNTERS):
            raise ValueError(f"the state of {where!r} has not the fields {', '.join(COUNTERS)}")
        for counter in COUNTERS:
            _check_counter(where, counter, site)
        if site["features"] not in state.widths:
            raise ValueError(
                f"the state of {where!r} is for {site['features']} features; the adapter has "
                f"products of {', '.join(map(str, state.widths))}"
            )
        shape = state.config.groups(state.name, site["features"])
        _check_tensors(where, {"vectors": shape, "running": shape}, ("vectors",), tensors)


def _check_counter(name: str, key: str, described: Mapping[str, Any]) -> None:
    if key not in described:
        raise ValueError(f"the state of {name!r} lacks {key!r}")
    value = described[key]
    if key in ("direction", "delta_direction"):
        good = value in DIRECTIONS or (key == "delta_direction" and value is None)
        wanted = " or ".join(DIRECTIONS)
    elif key in _KINDS:
        good, wanted = isinstance(value, _KINDS[key]), _KINDS[key][0].__name__
    else:
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        wanted = "a whole number from 0 on"
    if not good:
        raise ValueError(f"the state of {name!r}: {key!r} is {_shown(value)}, not {wanted}")


def _check_tensors(
    name: str,
    expected: Mapping[str, tuple[int, ...] | None],
    needed: tuple[str, ...],
    tensors: Mapping[str, Tensor],
) -> None:
    for key, shape in expected.items():
        tensor = tensors.get(f"{name}.{key}")
        if tensor is None:
            if key in needed:
                raise ValueError(f"the state of {name!r} lacks the tensor {key!r}")
            continue
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"the state of {name!r}: the tensor {key!r} is {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; floating point of shape {shape} is needed"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
