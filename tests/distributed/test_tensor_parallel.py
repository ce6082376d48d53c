"""Layers that are split over ranks train as whole ones do; other splits are refused."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.closeness import assert_close
from tests.distributed.launch import on_ranks
from tests.distributed.splitting import Split, refusals, train, train_all

GROUPS = {"num_groups": 4}
SETUPS = {
    "average": Split(GROUPS),
    "running-bias": Split({**GROUPS, "init": "running_average", "vectors": "per_group"}, bias=True),
    "signs-redrawn": Split(
        {**GROUPS, "init": "rademacher", "vectors": "per_group", "refresh_every": 2},
        optimizer="sgd",
    ),
    "every-3": Split({**GROUPS, "fold_every": 3, "track_delta": True}),
    "never-folded": Split({**GROUPS, "fold_every": None}, bias=True),
    "dense": Split({**GROUPS, "gradient": "dense"}),
    "recomputed": Split(GROUPS, recompute=True),
}


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "2x2-ranks-with-fsdp2"])
def ranks(request, tmp_path_factory):
    """What each rank has at the end of each training."""
    return on_ranks(request.param, train_all, tmp_path_factory.mktemp("ranks"), SETUPS)


@pytest.fixture(scope="module")
def alone():
    return train_all(SETUPS)


@pytest.mark.parametrize("name", SETUPS)
def test_split_layers_train_as_whole_ones(ranks, alone, name):
    for result in ranks:
        assert result[name].keys() == alone[name].keys()
        for key, expected in alone[name].items():
            assert_close(result[name][key], expected, 1e-10)


def test_training_changes_the_weights(alone):
    one, other = train(Split(GROUPS, steps=1)), alone["average"]
    key = "model.layers.0.mlp.down_proj.weight"
    assert (one[key] - other[key]).abs().max() > 1e-3


def test_other_splits_are_refused_by_name(tmp_path):
    for said in on_ranks(2, refusals, tmp_path):
        assert said.keys() == {"between groups", "scale", "plain input", "other layout", "already"}
        assert all("'0'" in text for text in said.values())
        assert "split every 8" in said["between groups"]
        assert "num_groups" in said["between groups"]
        assert "ScaleShift" in said["scale"]
        assert "ColwiseParallel" in said["plain input"]
        assert "its input is" in said["other layout"]
        assert "before fully_shard" in said["already"]
