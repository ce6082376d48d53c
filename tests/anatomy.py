"""What a model is made of, to see that nothing was changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Class, attributes, registered names, hooks and flags of every module."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            {
                key: sorted(value, key=str)
                for key, value in module.__dict__.items()
                if isinstance(value, (dict, set))
            },
            {key: p.requires_grad for key, p in module._parameters.items() if p is not None},
        )
        for name, module in model.named_modules()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_same(there: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    assert list(there) == list(here)
    for key, value in there.items():
        assert torch.equal(value, here[key]), key
