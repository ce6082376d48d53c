"""Which layers targets ask for, and the reason why each of the others stays exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from velora_torch import VeloraConfig
from velora_torch.selection import NOT_TARGETED, Selection, select

from .readable import as_id


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.h = nn.ModuleList([Block(), Block()])
        self.drop = nn.Dropout()
        self.last = nn.Linear(8, 4)


def chosen(config: VeloraConfig, model: nn.Module | None = None) -> list[str]:
    return [layer.name for layer in pick(config, model).chosen]


def pick(config: VeloraConfig, model: nn.Module | None = None) -> Selection:
    return select(Model() if model is None else model, config)


QV = ["h.0.q_proj", "h.0.v_proj", "h.1.q_proj", "h.1.v_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [*QV, "last"]),
        (["v_proj"], ["h.0.v_proj", "h.1.v_proj"]),
        ("v_proj", ["h.0.v_proj", "h.1.v_proj"]),
        (["h.1.v_proj", "last"], ["h.1.v_proj", "last"]),
        (["h.0"], ["h.0.q_proj", "h.0.v_proj"]),
        (["h"], QV),
        ({"q_proj", "v_proj"}, QV),
        (r".*\.[qv]_proj", QV),
        (r"h\.1\..*", ["h.1.q_proj", "h.1.v_proj"]),
        ("last|h.0.v_proj", ["h.0.v_proj", "last"]),
        (lambda name, module: isinstance(module, nn.Linear) and module.out_features == 4, ["last"]),
        (lambda name, module: 1 if name.endswith("q_proj") else 0, ["h.0.q_proj", "h.1.q_proj"]),
    ],
    ids=as_id,
)
def test_targets(targets: Any, expected: list[str]) -> None:
    assert chosen(VeloraConfig(targets=targets, num_groups=4)) == expected


def test_a_name_matches_whole_components_only() -> None:
    with pytest.raises(ValueError, match="'proj' matches no layer"):
        pick(VeloraConfig(targets=["proj"], num_groups=4))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["v_prj"], r"'v_prj' matches no layer; nearest: v_proj, q_proj.*last, q_proj, v_proj$"),
        (["v_proj", "k_proj"], r"'k_proj' matches no layer; nearest: "),
        (["h.0.v_prj"], r"'h.0.v_prj' matches no layer; nearest: h.0.v_proj"),
        (".*v_prj", r"'\.\*v_prj' matches no layer; nearest: v_proj"),
        (["zzzzz"], r"'zzzzz' matches no layer. Linear layers of this model: last, q_proj, v_proj"),
        (["drop"], r"'drop' matches no layer"),
        (["embed"], r"leaves nothing to compress:\n  embed: Embedding is not a linear layer$"),
    ],
    ids=str,
)
def test_targets_that_match_nothing_show_the_nearest_names(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pick(VeloraConfig(targets=targets, num_groups=4))


def test_a_model_without_linear_layers_says_so() -> None:
    with pytest.raises(ValueError, match="Linear layers of this model: none"):
        pick(VeloraConfig(targets=["fc"]), nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_every_other_layer_has_a_reason() -> None:
    config = VeloraConfig(targets=["v_proj"], num_groups=4)
    assert pick(config).exact == {
        "embed": "Embedding is not a linear layer",
        "conv": "Conv1d is not a linear layer",
        "h.0.q_proj": NOT_TARGETED,
        "h.0.norm": "LayerNorm is not a linear layer",
        "h.1.q_proj": NOT_TARGETED,
        "h.1.norm": "LayerNorm is not a linear layer",
        "last": NOT_TARGETED,
    }


def test_many_reasons_are_cut_short() -> None:
    model = nn.Sequential(*(nn.LayerNorm(4) for _ in range(11)))
    with pytest.raises(ValueError, match=r"\n  7: LayerNorm is not a linear layer\n  and 3 more$"):
        pick(VeloraConfig(), model)


def test_groups_of_each_layer() -> None:
    config = VeloraConfig(num_groups={"v_proj": 2, "h.1.v_proj": 8, "default": 4})
    sizes = {layer.name: (layer.groups, layer.size) for layer in pick(config).chosen}
    assert sizes == {
        "h.0.q_proj": (4, 2),
        "h.0.v_proj": (2, 4),
        "h.1.q_proj": (4, 2),
        "h.1.v_proj": (8, 1),
        "last": (4, 2),
    }


def test_all_linear_skips_layers_that_are_too_narrow() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 8))
    selection = pick(VeloraConfig(num_groups=4), model)
    assert [layer.name for layer in selection.chosen] == ["1"]
    assert selection.exact["0"].startswith("num_groups=4 is larger than the 2 input features")


def test_all_linear_skips_layers_without_an_entry() -> None:
    selection = pick(VeloraConfig(num_groups={"v_proj": 4}))
    assert [layer.name for layer in selection.chosen] == ["h.0.v_proj", "h.1.v_proj"]
    assert "num_groups has no entry for layer 'last'" in selection.exact["last"]


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.abs(), self.bias)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 8, 8))


def replaced() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def frozen() -> nn.Module:
    return nn.Linear(8, 8).requires_grad_(False)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Own(8, 8), "Own brings a forward of its own"),
        (Fused(), "fused weight of more than two dimensions"),
        (replaced(), "its forward was replaced on this instance"),
        (frozen(), "frozen: keeps no input"),
        (nn.Bilinear(8, 8, 8), "fused weight of more than two dimensions"),
        (nn.Conv2d(1, 1, 1), "Conv2d is not a linear layer"),
        (nn.LSTM(8, 8), "LSTM is not a linear layer"),
        (nn.PReLU(), "PReLU is not a linear layer"),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3)),
            "ParametrizedConv1d is not a linear layer",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_reasons(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), layer)
    assert pick(VeloraConfig(num_groups=4), model).exact["1"] == reason


def test_parametrized_weights_stay_exact() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    exact = pick(VeloraConfig(num_groups=4), model).exact
    assert exact["1"] == "its weight is computed by a parametrization"
    assert parametrize.is_parametrized(model[1])


def test_multihead_attention_stays_exact_even_when_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    selection = pick(VeloraConfig(targets=["0", "out_proj"], num_groups=4), model)
    assert [layer.name for layer in selection.chosen] == ["0"]
    assert "uses its weight without calling the layer" in selection.exact["1.out_proj"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_stay_exact() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    exact = pick(VeloraConfig(num_groups=4), model).exact
    assert exact["1"].startswith("not initialised yet: run one batch")
