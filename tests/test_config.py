"""Configuration: what is accepted, and what every wrong value is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from velora_torch import VeloraConfig
from velora_torch.config import RECOMMENDED

from .readable import as_id


def test_defaults_are_the_promised_ones() -> None:
    config = VeloraConfig()
    assert config.targets == "all-linear"
    assert config.num_groups == 32
    assert config.sub_token_size is None
    assert (config.init, config.vectors, config.refresh_every) == ("average", "shared", None)
    assert (config.scale, config.gradient, config.seed) == (1.0, "factored", 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "averge"}, r"unknown init 'averge' \(did you mean 'average'\?\): choose one of "),
        ({"init": "zzz"}, "unknown init 'zzz': choose one of average, running_average, batch_av"),
        ({"init": None}, "unknown init None: choose one of"),
        ({"vectors": "per-group"}, r"unknown vectors 'per-group' \(did you mean 'per_group'\?\)"),
        ({"gradient": "factor"}, r"unknown gradient 'factor' \(did you mean 'factored'\?\)"),
        ({"rounding": "stochastics"}, r"unknown rounding .*did you mean 'stochastic'"),
        ({"num_groups": 0}, "num_groups must be a positive whole number, got 0"),
        ({"num_groups": -3}, "num_groups must be a positive whole number, got -3"),
        ({"num_groups": True}, "num_groups must be a positive whole number, got True"),
        ({"num_groups": 8.0}, "num_groups must be a positive whole number, got 8.0"),
        ({"num_groups": "8"}, "num_groups must be a positive whole number, got '8'"),
        ({"num_groups": {}}, "num_groups is an empty dict: name at least one layer"),
        ({"num_groups": {"v": 0}}, r"num_groups\['v'\] must be a positive whole number, got 0"),
        ({"sub_token_size": 0}, "sub_token_size must be a positive whole number, got 0"),
        ({"sub_token_size": {"v": 1.5}}, r"sub_token_size\['v'\] must be a positive whole numb"),
        (
            {"num_groups": 4, "sub_token_size": 8},
            r"say the same thing .*got num_groups=4 and sub_token_size=8: give one of them",
        ),
        ({"refresh_every": 0}, "refresh_every must be a positive whole number, got 0"),
        ({"refresh_every": 1.5}, "refresh_every must be a positive whole number, got 1.5"),
        ({"fold_every": 0}, "fold_every must be a positive whole number, got 0"),
        ({"scale": 0}, "scale must be a positive finite number, got 0"),
        ({"scale": float("nan")}, "scale must be a positive finite number, got nan"),
        ({"scale": float("inf")}, "scale must be a positive finite number, got inf"),
        ({"scale": True}, "scale must be a positive finite number, got True"),
        ({"scale": "1"}, "scale must be a positive finite number, got '1'"),
        ({"seed": 1.0}, "seed must be a whole number, got 1.0"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"running_decay": 1.0}, r"running_decay must be in \[0, 1\), got 1.0"),
        ({"running_decay": "0.9"}, r"running_decay must be in \[0, 1\), got '0.9'"),
        ({"track_delta": "no"}, "track_delta must be True or False, got 'no'"),
        ({"targets": []}, "targets must be 'all-linear', layer names, a regular expression or a"),
        ({"targets": ""}, r"targets must be 'all-linear', layer names, .*got ''"),
        ({"targets": [""]}, r"targets must be 'all-linear', layer names, .*got \[''\]"),
        ({"targets": ["a", 1]}, r"targets must be .*got \['a', 1\]"),
        ({"targets": 5}, "targets must be .*got 5"),
        ({"targets": None}, "targets must be .*got None"),
        ({"targets": "(v_proj"}, r"'\(v_proj' is neither 'all-linear' nor a valid regular expr"),
        (
            {"fold_every": None, "refresh_every": 10},
            r"new vectors may only be drawn after a fold.*refresh_every=10.*or let folds happen",
        ),
        ({"fold_every": None, "init": "batch_average"}, "init='batch_average'"),
        ({"fold_every": None, "init": "running_average"}, "init='running_average'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused_with_advice(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VeloraConfig(**settings)


def test_fields_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        VeloraConfig("all-linear")  # type: ignore[misc]


def test_pending_coefficients_do_not_concern_dense_gradients() -> None:
    assert VeloraConfig(fold_every=None, refresh_every=5, gradient="dense").refresh_every == 5


def test_targets_are_kept_as_a_tuple() -> None:
    names = ["v_proj", "down_proj"]
    config = VeloraConfig(targets=iter(names))
    assert config.targets == ("v_proj", "down_proj")


def test_later_changes_of_a_dict_do_not_reach_the_configuration() -> None:
    sizes = {"default": 4}
    config = VeloraConfig(num_groups=sizes)
    sizes["default"] = 0
    assert config.groups("x", 16) == (4, 4)


@pytest.mark.parametrize(
    ("settings", "name", "features", "expected"),
    [
        ({"num_groups": 4}, "a", 16, (4, 4)),
        ({"num_groups": 4}, "a", 18, (4, 5)),
        ({"num_groups": 16}, "a", 16, (16, 1)),
        ({"num_groups": 1}, "a", 16, (1, 16)),
        ({"sub_token_size": 4}, "a", 16, (4, 4)),
        ({"sub_token_size": 5}, "a", 16, (4, 5)),
        ({"sub_token_size": 16}, "a", 16, (1, 16)),
        ({"num_groups": {"v_proj": 2, "default": 8}}, "h.0.v_proj", 16, (2, 8)),
        ({"num_groups": {"v_proj": 2, "default": 8}}, "h.0.q_proj", 16, (8, 2)),
        ({"num_groups": {"proj": 2, "default": 8}}, "h.0.v_proj", 16, (8, 2)),
        ({"num_groups": {"v": 2, "attn.v": 4, "default": 8}}, "h.attn.v", 16, (4, 4)),
        ({"num_groups": {"v": 2, "attn.v": 4, "default": 8}}, "h.cross.v", 16, (2, 8)),
        ({"num_groups": {"v": 2}}, "h.v.lora_A.default", 16, (2, 8)),
        ({"num_groups": {"h.0": 2, "h.1": 4}}, "h.1.v", 16, (4, 4)),
        ({"sub_token_size": {"v": 2, "default": 8}}, "h.v", 16, (8, 2)),
    ],
    ids=str,
)
def test_groups_of_a_layer(
    settings: dict[str, Any], name: str, features: int, expected: tuple[int, int]
) -> None:
    assert VeloraConfig(**settings).groups(name, features) == expected


def test_too_many_groups_name_the_layer_and_the_limit() -> None:
    with pytest.raises(ValueError, match=r"num_groups=17 .* 16 input .* 'h.v'; use at most 16"):
        VeloraConfig(num_groups=17).groups("h.v", 16)
    with pytest.raises(ValueError, match=r"sub_token_size=17 .* 16 input .* 'h.v'; use at most 16"):
        VeloraConfig(sub_token_size=17).groups("h.v", 16)


def test_a_layer_without_an_entry_is_named() -> None:
    with pytest.raises(ValueError, match=r"num_groups has no entry for layer 'h.q'; it names 'v'"):
        VeloraConfig(num_groups={"v": 2}).groups("h.q", 16)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["a", "b"], r".*\.v", lambda name, module: True], ids=as_id
)
def test_to_dict_is_json(targets: Any) -> None:
    config = VeloraConfig(targets=targets, num_groups={"default": 4})
    again = json.loads(json.dumps(config.to_dict()))
    assert again == config.to_dict()
    assert again["num_groups"] == {"default": 4}


class _Chooser:
    """A callable that holds a model, as a closure may."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, name: str, module: nn.Module) -> bool:
        return True

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the model must not be copied")


def test_to_dict_does_not_copy_what_a_function_holds() -> None:
    config = VeloraConfig(targets=_Chooser(nn.Linear(2, 2)))
    assert config.to_dict()["targets"] == "<function targets>"


@pytest.mark.parametrize("purpose", list(RECOMMENDED))
def test_recommended_settings_are_one_word_and_can_be_changed(purpose: Any) -> None:
    config = VeloraConfig.recommended(purpose)
    for name, value in RECOMMENDED[purpose].items():
        found = getattr(config, name)
        assert (list(found) if isinstance(found, tuple) else found) == value
    changed = VeloraConfig.recommended(purpose, num_groups=5, seed=3)
    assert (changed.num_groups, changed.sub_token_size, changed.seed) == (5, None, 3)


def test_an_unknown_purpose_is_told() -> None:
    with pytest.raises(ValueError, match=r"unknown purpose 'lra' \(did you mean 'lora'\?\)"):
        VeloraConfig.recommended("lra")  # type: ignore[arg-type]
