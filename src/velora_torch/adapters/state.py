"""Adapters saved alone: what was added to a model, and what of it trains."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from velora_torch.adapters.attach import adapted_modules
from velora_torch.layers import CompressedLayer


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors and all else that trains (the head), by name.

    Detached, and good for ``safetensors.torch.save_file``. Pending coefficients of compressed
    adapters are folded, as ``model.state_dict()`` does.

    Raises:
        ValueError: nothing of the model is an adapter or trains.
    """
    keys = _keys(model)
    state = model.state_dict()
    return {key: state[key].detach().contiguous() for key in keys}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the adapters that :func:`adapter_state_dict` gave, in place.

    Add the same adapters first. Nothing is changed unless everything fits.

    Raises:
        ValueError: the model has other adapters, or adapters of other shapes.
    """
    keys = _keys(model)
    own = model.state_dict()
    missing, extra = sorted(keys - state.keys()), sorted(state.keys() - keys)
    if missing or extra:
        raise ValueError(
            f"these adapters are another model's, or were added with other settings: "
            f"{len(missing)} tensors of the model are missing (such as {_first(missing)}), and "
            f"{len(extra)} are not the model's (such as {_first(extra)}). Add adapters with the "
            f"same method, targets and head first"
        )
    for key in sorted(keys):
        if own[key].shape != state[key].shape:
            raise ValueError(
                f"adapter tensor {key!r} has shape {tuple(state[key].shape)}, and the model's has "
                f"{tuple(own[key].shape)}: add adapters with the same rank and to the same model"
            )
    model.load_state_dict(dict(state), strict=False)


def _keys(model: nn.Module) -> set[str]:
    keys = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, module in adapted_modules(model).items():
        adapter = module.get_submodule(module.child)
        keys |= {f"{name}.{module.child}.{own}" for own, _ in adapter.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):  # its weight is trained by its coefficients
            keys |= {f"{name}.weight" if name else "weight"}
            keys -= {f"{name}.coef" if name else "coef"}
    if not keys:
        raise ValueError(
            "nothing of this model is an adapter, and nothing trains: there is nothing to save "
            "or load"
        )
    return keys


def _first(keys: list[str]) -> str:
    return repr(keys[0]) if keys else "-"
