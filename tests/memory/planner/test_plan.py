"""Plans: what fits is found without simulating everything, and nothing that fits is missed."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

pytest.importorskip("transformers")

from velora_torch import VeloraConfig
from velora_torch.memory.planner import search as searching
from velora_torch.memory.planner.budget import gib, parse_budget
from velora_torch.memory.planner.candidates import RECIPE_OPTIMIZERS, Candidate
from velora_torch.memory.planner.largest import largest
from velora_torch.memory.planner.plan import Plan, plan
from velora_torch.memory.planner.predictor import Predictor, Size
from velora_torch.memory.planner.space import Holdings, layer_sets
from velora_torch.memory.simulator.architecture import resolve
from velora_torch.memory.simulator.setup import Setup
from velora_torch.memory.simulator.simulate import SimulationError, simulate
from velora_torch.memory.simulator.simulation import Coarseness

from ... import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

SIZE = Size(2, 16)
COMPRESSED = VeloraConfig(sub_token_size=8, init="random", vectors="per_group", refresh_every=50)
AVERAGED = VeloraConfig(num_groups=2)


def model(layers: int = 4) -> Any:
    return tiny_models.llama(layers=layers)


BATCH = torch.zeros(256, 32)


def small() -> nn.Module:
    """Four blocks that are quick to simulate; too few operators for fine distinctions."""
    torch.manual_seed(0)
    return nn.Sequential(*(tiny_models.Net(32, 32) for _ in range(4)))


def total(net: nn.Module, x: Any) -> Tensor:
    return net(x).sum()


def planned(budget: str | int, **choices: Any) -> Plan:
    return plan(small(), batch=BATCH, loss=total, budget=budget, **choices)


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("24 GB", 24 * 10**9),
        ("8000MiB", 8000 * 2**20),
        ("1.5 gib", 3 * 2**29),
        (512, 512),
    ],
)
def test_budgets(text: str | int, count: int):
    assert parse_budget(text) == count


@pytest.mark.parametrize("text", ["24", "lots", "0GiB", "-1GiB", "", "1e3GiB", 0, -5, True, None])
def test_what_is_no_budget(text: Any):
    with pytest.raises(ValueError, match=r"budget .*'24GiB'.*'24 GB'.*'8000MiB'"):
        parse_budget(text)


def test_gib():
    assert (gib(3 * 2**29), gib(2**20)) == ("1.50 GiB", "1.00 MiB")


# ------------------------------------------------------------------ predictions


CASES = {
    "plain": Setup(optimizer="sgd_momentum"),
    "foreach": Setup(optimizer="adamw", chunked_loss=True),
    "8 bit, every other": Setup(optimizer="adamw_8bit", checkpoint_every=2),
    "galore": Setup(optimizer="galore_adamw", recompute=True),
    "sgd": Setup(optimizer="sgd", checkpoint_every=1),
    "compressed": Setup(velora=COMPRESSED, optimizer="adamw_fused", recompute=True),
    "averaged": Setup(velora=AVERAGED, checkpoint_every=1, optimizer="adamw_8bit"),
    "running": Setup(velora=replace(AVERAGED, init="running_average")),
    "lora": Setup(method="lora", velora=AVERAGED, lora_rank=4, chunked_loss=True),
    "accumulated": Setup(velora=COMPRESSED, accumulation=2),
}


@pytest.mark.parametrize("setup", CASES.values(), ids=CASES.keys())
def test_parts_of_a_step_make_the_whole(setup: Setup):
    if setup.method == "lora":
        pytest.importorskip("peft")
    architecture = resolve(model(2))
    predicted = Predictor(architecture, "bfloat16", "cuda").predict(setup, SIZE)
    whole = simulate(architecture, batch=SIZE.batch, seq=SIZE.seq, setup=setup)
    for name in ("peak_bytes", "peak_at", "weights", "gradients", "optimizer_state", "flops"):
        assert getattr(predicted, name) == getattr(whole, name), name
    assert predicted.coarseness == whole.coarseness
    assert predicted.peak == whole.peak


def test_a_step_at_another_size_is_not_simulated_again():
    architecture = resolve(model(2))
    predictor = Predictor(architecture, "bfloat16", "cuda")
    setup = Setup(optimizer="adamw", checkpoint_every=1)
    predictor.predict(setup, Size(1, 8))
    before = predictor.simulations
    predicted = predictor.predict(setup, SIZE)
    assert predictor.simulations == before + 1
    whole = simulate(architecture, batch=SIZE.batch, seq=SIZE.seq, setup=setup)
    assert (predicted.peak_bytes, predicted.peak_at) == (whole.peak_bytes, "optimizer")


@pytest.mark.parametrize("optimizer", ["adamw_fused", "adamw_8bit", "sgd_momentum", "galore_adamw"])
@pytest.mark.parametrize("velora", [None, COMPRESSED], ids=["plain", "compressed"])
def test_the_bound_by_arithmetic_is_one(optimizer: str, velora: VeloraConfig | None):
    if velora is not None and optimizer == "galore_adamw":
        pytest.skip("no weight gradients to project")
    held = Holdings.of(small()).with_velora(small(), velora)
    batch = torch.zeros(1, 32)
    found = simulate(small(), batch=batch, loss=total, velora=velora, optimizer=optimizer)
    assert held.at_least(optimizer) <= found.peak_bytes
    assert held.weights <= found.weights < 1.5 * held.weights
    assert held.trained <= found.gradients < 1.5 * held.trained
    assert held.states(optimizer) <= found.optimizer_state


# ------------------------------------------------------------------ the search


def everything() -> dict[Setup, Any]:
    """Every combination of a small space, each simulated whole."""
    architecture, found = resolve(small()), {}
    for velora, every, again, optimizer in itertools.product(
        (None, COMPRESSED), (None, 2, 1), (False, True), ("adamw_fused", "adamw_8bit")
    ):
        setup = Setup(velora=velora, checkpoint_every=every, recompute=again, optimizer=optimizer)
        found[str(setup)] = simulate(architecture, batch=BATCH, loss=total, setup=setup)
    return found


@pytest.fixture(scope="module")
def brute_force() -> dict[Setup, Any]:
    return everything()


@pytest.mark.parametrize("share", [1.01, 0.9, 0.75, 0.6, 0.5, 0.4])
def test_nothing_that_fits_is_missed(
    brute_force: dict[str, Any], share: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "velora_torch.memory.planner.space._configs", lambda model, method: [None, COMPRESSED]
    )
    peaks = {name: s.peak_bytes for name, s in brute_force.items()}
    budget = int(share * max(peaks.values()))
    made = planned(budget, top=None)
    found = {str(c.setup): c for c in made.candidates}
    # A plan has checkpoints of 1 block in 4 besides.
    ours = {name: c for name, c in found.items() if "1 in 4" not in name}
    assert all(c.peak_bytes == peaks[name] <= budget for name, c in ours.items())
    pairs = {
        (s.setup.velora, s.setup.checkpoint_every)
        for s in brute_force.values()
        if s.peak_bytes <= budget
    }
    assert {(c.setup.velora, c.setup.checkpoint_every) for c in ours.values()} == pairs
    for candidate in ours.values():  # no less saving sibling fits
        setup = candidate.setup
        if setup.recompute:
            assert peaks[str(replace(setup, recompute=False))] > budget
        if setup.optimizer == "adamw_8bit":
            assert peaks[str(replace(setup, optimizer="adamw_fused", recompute=True))] > budget
    ranks = [c.rank(("adamw_fused", "adamw_8bit")) for c in made.candidates]
    assert ranks == sorted(ranks)
    if not pairs:
        assert made.smallest is not None
        assert made.smallest.peak_bytes <= min(peaks.values())


def test_the_fastest_comes_first_and_costs_are_of_the_plain_step():
    made = planned("1GiB", velora=None, top=None)
    assert [c.setup.checkpoint_every for c in made.candidates] == [None, 4, 2, 1]
    costs = [c.step_cost for c in made.candidates]
    assert costs[0] == 1.0
    assert costs == sorted(costs)
    blocks = costs[-1] - 1
    assert costs[1] - 1 == pytest.approx(blocks / 4)
    assert costs[2] - 1 == pytest.approx(blocks / 2)
    assert all(str(c.coarseness) == "exact" and c.fits for c in made.candidates)


def test_a_plan_tells_of_each_simulation():
    told: list[int] = []
    made = planned("1GiB", velora=None, progress=told.append)
    assert told == list(range(1, made.simulations + 1)) != []


def test_equal_costs_put_exact_gradients_first():
    adapted = {"method": "lora", "lora_rank": 1, "checkpoint_every": None, "recompute": False}
    made = plan(model(2), seq=8, budget="1GiB", chunked_loss=False, top=None, **adapted)
    tied = [c for c in made.candidates if round(c.step_cost, 2) == 1]
    assert len(tied) > 1
    assert [c.setup.velora is None for c in tied] == [True] + [False] * (len(tied) - 1)
    # What is compressed has the settings recommended for adapters.
    recommended = VeloraConfig.recommended("lora", track_delta=False)
    for candidate in tied[1:]:
        assert candidate.setup.velora is not None
        assert replace(candidate.setup.velora, targets="all-linear") == recommended


def test_equal_costs_put_the_gradient_first_that_drops_least():
    (whole,) = planned("1GiB", velora=None, checkpoint_every=None).candidates

    def dropping(kept: int, peak: int) -> Candidate:
        simulation = replace(
            whole.simulation, coarseness=Coarseness(100, 200, kept), peak_bytes=peak
        )
        return replace(whole, simulation=simulation)

    gentle, strong = dropping(25, 2), dropping(6, 1)
    ranked = sorted([strong, gentle, whole], key=lambda c: c.rank((whole.setup.optimizer,)))
    assert ranked == [whole, gentle, strong]
    assert gentle.coarseness.dropped == 0.375


def test_nothing_fits():
    weights = planned("1GiB", velora=None, checkpoint_every=None).weights_bytes
    made = planned(weights + 1024)
    assert made.candidates == []
    assert made.smallest is not None
    assert not made.smallest.fits
    assert made.missing_bytes == made.smallest.peak_bytes - weights - 1024 > 0
    assert made.smallest.setup.velora is not None
    assert "Nothing fits. The smallest needs" in str(made)
    assert gib(made.missing_bytes) in str(made)


def test_a_budget_below_the_weights_is_refused_before_any_search(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[plan.__module__], "Search", None)
    with pytest.raises(ValueError, match=r"below the weights alone: llama-7b \(full\) holds 12.55"):
        plan("llama-7b", budget="8GiB")


def test_what_cannot_be_simulated_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch):
    real = Predictor.passes

    def passes(self: Predictor, setup: Setup, size: Size) -> Any:
        if setup.velora is not None:
            raise SimulationError("the operator aten.strange has no form without data")
        return real(self, setup, size)

    monkeypatch.setattr(searching.Predictor, "passes", passes)
    made = planned("1GiB", checkpoint_every=None, top=None)
    assert [c.setup.velora for c in made.candidates] == [None]
    assert made.skipped
    assert all("VeLoRA" in setup for setup in made.skipped)
    assert all("aten.strange" in reason for reason in made.skipped.values())
    assert "skipped: full, VeLoRA on" in str(made)


def test_a_model_and_a_batch_of_ones_own():
    made = planned("10MiB", top=1)
    assert made.candidates[0].setup.velora is not None
    assert made.batch is None
    assert {c.setup.chunked_loss for c in made.candidates} == {False}  # there is no head
    with pytest.raises(ValueError, match="number of examples"):
        planned("10MiB", max_batch=True)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"optimizers": ["adamw_8bits"]}, "did you mean 'adamw_8bit'"),
        ({"method": "lroa"}, "did you mean 'lora'"),
        ({"device": "tpu"}, "cuda, cpu"),
        ({"checkpoint": 2}, "checkpoint_every"),
        ({"max_batch": True, "max_seq": True}, "exclude each other"),
        ({"top": 0}, "top must be at least 1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_mistakes(choices: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        planned("1GiB", **choices)


# ------------------------------------------------------------------ layers


@pytest.mark.parametrize(
    ("make", "sets"),
    [
        (
            tiny_models.llama,
            [
                ("v_proj", "down_proj"),
                ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                "all-linear",
            ],
        ),
        (tiny_models.gpt2, ["all-linear"]),  # q, k and v are one layer
        (tiny_models.net, ["all-linear"]),
    ],
)
def test_sets_of_layers(make: Any, sets: list[Any]):
    assert layer_sets(make()) == sets


@pytest.mark.parametrize("make", [tiny_models.bert, tiny_models.t5, tiny_models.vit])
def test_sets_of_layers_are_of_the_model(make: Any):
    built = make()
    found = layer_sets(built)
    assert len(found) == 3
    names = [name for name, module in built.named_modules() if isinstance(module, nn.Linear)]
    for part in itertools.chain(*found[:2]):
        assert any(f".{name}.".endswith(f".{part}.") for name in names)
    assert not {"query", "key", "q", "k", "q_proj", "k_proj"} & set(found[1])


# ------------------------------------------------------------------ the largest size


@pytest.mark.parametrize("limit", [1, 2, 7, 40, 99, 100])
@pytest.mark.parametrize("guess", [1, 7, 38, 41, 100])
def test_the_largest_count(limit: int, guess: int):
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= limit

    assert largest(fits, guess, 100) == limit
    assert len(asked) == len(set(asked)) <= 12
    if guess == limit != 100 and guess > 1:
        assert asked == [limit, limit + 1]


@pytest.mark.parametrize("dimension", ["batch", "seq"])
def test_the_largest_size_fits_and_the_next_does_not(dimension: str):
    budget, unit = (600_000, 1) if dimension == "batch" else (600_000, 8)
    choices: dict[str, Any] = {"seq": 16} if dimension == "batch" else {"batch": 7}
    kept: dict[str, Any] = {"velora": None, "optimizers": ["adamw_fused"], "checkpoint_every": 1}
    made = plan(model(2), budget=budget, top=2, **kept, **{f"max_{dimension}": True}, **choices)
    assert made.searched == dimension
    sizes = [c.largest for c in made.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes
    for candidate in made.candidates:
        assert candidate.largest is not None
        for extra in (0, unit):
            size = choices | {dimension: candidate.largest + extra}
            if size["seq"] > 32:
                continue
            found = simulate(model(2), setup=candidate.setup, **size)
            assert (found.peak_bytes <= budget) == (extra == 0)


# ------------------------------------------------------------------ what comes out


def test_recipe_lines_are_a_recipe(tmp_path: Any):
    pytest.importorskip("pydantic")
    from velora_torch.training.recipe import load_recipe

    simulated = simulate(model(2), batch=2, seq=16)
    few = VeloraConfig(targets=("v_proj", "down_proj"), sub_token_size=8, track_delta=False)
    for velora, every, name in itertools.product(
        (None, COMPRESSED, AVERAGED, few), (None, 1, 2), RECIPE_OPTIMIZERS
    ):
        setup = Setup(velora=velora, checkpoint_every=every, recompute=True, optimizer=name)
        candidate = Candidate(replace(simulated, setup=setup), step_cost=1.0, fits=True)
        path = tmp_path / "plan.yaml"
        path.write_text(candidate.recipe_lines)
        recipe = load_recipe(path, ["data.train=trec"])
        assert recipe.train.optimizer == RECIPE_OPTIMIZERS[name]
        assert (recipe.train.batch_size, recipe.data.max_length) == (2, 16)
        assert recipe.train.recompute
        assert not recipe.train.chunked_loss
        assert int(recipe.train.gradient_checkpointing) == (every or 0)
        if velora is None:
            assert recipe.velora is None
        else:
            assert recipe.velora is not None
            assert VeloraConfig(**recipe.velora.to_kwargs()) == velora
        assert yaml.safe_load(candidate.recipe_lines) == candidate.recipe


def test_json():
    import json

    values = json.loads(json.dumps(planned("1GiB", top=1, velora=COMPRESSED).to_dict()))
    (candidate,) = values["candidates"]
    assert candidate["peak_gib"] == candidate["peak_bytes"] / 2**30
    assert sum(candidate["peak"].values()) == candidate["peak_bytes"]
    flops = candidate["flops"]
    assert sum(n for name, n in flops.items() if name != "total") == flops["total"]
    assert candidate["recipe"].startswith("dtype: bfloat16\nmethod: full\nvelora:\n")
