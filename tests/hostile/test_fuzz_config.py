"""Configurations of any values: a ValueError says what is wrong, and what is accepted works."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_args

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import cases
from tests.tiny_models import batches, net, step
from velora_torch import VeloraConfig, compress, restore
from velora_torch.config import Gradient, Init, Purpose, Rounding, Vectors
from velora_torch.layers import CompressedLayer

NAMES = [field.name for field in fields(VeloraConfig)]
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "targets": st.sampled_from(
        ["all-linear", "first", ["first"], ("second",), ".*", lambda n, m: True]
    ),
    "num_groups": st.one_of(st.integers(1, 16), st.just({"first": 2, "default": 3})),
    "sub_token_size": st.one_of(st.integers(1, 16), st.just({"default": 4})),
    "init": st.sampled_from(get_args(Init)),
    "vectors": st.sampled_from(get_args(Vectors)),
    "refresh_every": st.integers(1, 3),
    "scale": st.floats(0.1, 10),
    "gradient": st.sampled_from(get_args(Gradient)),
    "seed": st.integers(0, 2**63 - 1),
    "rounding": st.sampled_from(get_args(Rounding)),
    "fold_every": st.one_of(st.none(), st.integers(1, 3)),
    "running_decay": st.floats(0, 0.99),
    "track_delta": st.booleans(),
    "train_frozen": st.booleans(),
}
others = st.one_of(
    cases.values,
    cases.texts.map(lambda text: [text]),
    st.dictionaries(cases.texts, cases.numbers, max_size=3),
    st.sampled_from([object(), torch.zeros(2), b"first", {1: 2}, {None: 3}, iter("ab"), len]),
)


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    """Some fields, most with a value that makes sense."""
    names = draw(st.lists(st.sampled_from(NAMES), max_size=5, unique=True))
    return {n: draw(SENSIBLE[n] if draw(st.integers(0, 2)) else others) for n in names}


purposes = st.one_of(st.none(), st.sampled_from(get_args(Purpose)), cases.scalars)


@cases.fuzz
@given(given_settings=settings(), purpose=purposes)
def test_any_configuration_is_refused_or_works(
    given_settings: dict[str, Any], purpose: Any
) -> None:
    with cases.watchdog():
        try:
            if purpose is None:
                config = VeloraConfig(**given_settings)
            else:
                config = VeloraConfig.recommended(purpose, **given_settings)
        except ValueError:
            return
        json.dumps(config.to_dict())
        model = net()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        try:
            compress(model, config)
        except ValueError:
            assert not any(isinstance(m, CompressedLayer) for m in model.modules())
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            step(model.train(), torch.optim.SGD(trained, lr=0.0), batches(1)[0])
            restore(model)
        for name, p in model.named_parameters():
            assert torch.equal(p, weights[name]), name
