"""What `optimizer: flora` of a recipe projects, and what GaLore and APOLLO take from a recipe."""

from __future__ import annotations

import re
from functools import partial

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

import torch

import velora_torch as velora
from tests.tiny_models import gpt2, llama
from tests.training import tiny
from velora_torch.pickles import projectors_to_devices
from velora_torch.training.assemble import assemble
from velora_torch.training.own_optimizers import OptimizerError, check_optimizer, own_optimizer
from velora_torch.training.recipe import load_recipe
from velora_torch.training.sections import TrainSection


def projected(model, **more):
    train = section("flora", rank=4).model_copy(update=more)
    name_of = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = own_optimizer(model, train, [])
    of_groups = [
        (group.get("rank"), name_of[id(p)])
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(name for _, name in of_groups) == sorted(name_of.values())
    return {name for rank, name in of_groups if rank == 4}


@pytest.mark.parametrize(
    ("make", "in_a_block"), [(llama, 7), (gpt2, 4)], ids=["linear", "GPT-2's Conv1D"]
)
def test_all_linear_layers_of_any_model(make, in_a_block):
    model = make()
    names = projected(model)
    assert sum(".0." in name for name in names) == in_a_block
    assert all(
        name.endswith("weight") and "norm" not in name and "ln_" not in name for name in names
    )
    assert not any(
        "embed" in name or "wte" in name or "wpe" in name for name in names - {"lm_head.weight"}
    )


def test_a_pattern_chooses():
    assert projected(llama(), optimizer_targets=r".*\.1\..*v_proj") == {
        "model.layers.1.self_attn.v_proj.weight"
    }
    assert len(projected(gpt2(), optimizer_targets=["c_fc"])) == 2


def test_dense_gradients_of_compressed_layers_are_projected():
    for model, layers in ((llama(), 15), (gpt2(), 8)):
        velora.compress(model, velora.VeloraConfig(num_groups=4, gradient="dense"))
        assert len(projected(model)) == layers


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(
        OptimizerError,
        match=r"'\.\*v_prj' matches none of the 15 linear layers .*q_proj, .*whole name",
    ):
        projected(llama(), optimizer_targets=".*v_prj")


def test_compressed_layers_alone_leave_nothing_to_project():
    model = llama()
    model.lm_head.requires_grad_(False)
    velora.compress(model, velora.VeloraConfig(num_groups=4))
    with pytest.raises(OptimizerError, match=re.escape("compressed ones train coefficients")):
        projected(model)
    for tied in (gpt2(), llama(tied=True)):  # whose head is the embedding
        velora.compress(tied, velora.VeloraConfig(num_groups=4))
        with pytest.raises(OptimizerError, match="has no weight to project"):
            projected(tied)
    model = llama()
    velora.compress(model, velora.VeloraConfig(num_groups=4))
    assert projected(model) == {"lm_head.weight"}


# ------------------------------------------------------------------ GaLore, APOLLO


@pytest.fixture
def optimizer(tmp_path):
    """Makes the optimizer of a tiny recipe."""

    def _make(name, *overrides, **train):
        if not name.startswith("adamw"):
            pytest.importorskip(f"{name.partition('_')[0]}_torch")
        model, rows = tiny.save_model(tmp_path / "model"), tiny.save_rows(tmp_path / "rows.jsonl")
        train |= {"optimizer": name, "optimizer_settings": {"rank": 4, **train.pop("more", {})}}
        written = tiny.recipe_dict(model, rows, tmp_path / "run", dtype="float32", train=train)
        recipe = load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written), overrides)
        ready = assemble(recipe, lambda line: None)
        return ready.model, ready.make_optimizer()

    return _make


@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")
@pytest.mark.parametrize("velora", ["velora=null", "velora.targets=[down_proj]"])
@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_all_groups_have_the_settings_of_the_recipe(optimizer, name, velora):
    train = {"betas": [0.8, 0.95], "eps": 1e-10, "weight_decay": 0.1}
    model, made = optimizer(name, velora, **train)
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = [(group, name_of[id(p)]) for group in made.param_groups for p in group["params"]]
    assert len(groups) == len(name_of) == len({name for _, name in groups})
    for group, name in groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-10), name
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.1), name
        assert ("rank" in group) == (name.endswith("proj.weight") or name == "lm_head.weight"), name


@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")
def test_projected_weights_may_have_an_eps_of_their_own(optimizer):
    _, made = optimizer("apollo_adamw", "velora=null", eps=1e-6, more={"eps": 1e-8})
    assert {("rank" in group, group["eps"]) for group in made.param_groups} == {
        (True, 1e-8),
        (False, 1e-6),
    }


@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")
def test_one_that_is_no_adam_has_the_decay_of_the_recipe(optimizer):
    model, made = optimizer("galore_adafactor", "velora=null", weight_decay=0.1)
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = [(group, name_of[id(p)]) for group in made.param_groups for p in group["params"]]
    assert len(groups) == len(name_of)
    for group, weight in groups:
        assert group["weight_decay"] == (0.0 if "norm" in weight else 0.1), weight


@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")
def test_galore_with_8_bits_neither_clips_updates_nor_skips_zeros(optimizer):
    pytest.importorskip("bitsandbytes")
    _, made = optimizer("galore_adamw_8bit", "velora=null")
    assert (made.args.max_unorm, made.args.skip_zeros) == (0.0, False)


@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")
@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_projecting_nothing_that_trains_is_refused(optimizer, name):
    """Transformers takes what is compressed for projected."""
    targets = {"optimizer_targets": [".*down_proj"]}
    with pytest.raises(OptimizerError, match="would project nothing that trains"):
        optimizer(name, "velora.targets=[down_proj]", **targets)
    optimizer(name, "velora.targets=[down_proj]", "velora.gradient=dense", **targets)


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_those_that_step_in_the_backward_pass_are_refused(name):
    with pytest.raises(OptimizerError, match=f"; use {name.removesuffix('_layerwise')}$"):
        check_optimizer(section(name, rank=4))


def test_8_bit_states_of_one_model_do_not_depend_on_another(optimizer):
    """bitsandbytes has one list of the embeddings, which get 32 bits, for all of a process."""
    bnb = pytest.importorskip("bitsandbytes")

    def bits_of(model, made):
        made.check_overrides()  # as its first step does
        name_of = {id(p): name for name, p in model.named_parameters()}
        return {
            name_of[id(p)]: made.get_config(index, place, group)["optim_bits"]
            for index, group in enumerate(made.param_groups)
            for place, p in enumerate(group["params"])
        }

    def expected(model):
        return {name: 32 if "embed" in name else 8 for name, _ in model.named_parameters()}

    plain = partial(optimizer, "adamw_bnb_8bit", "velora=null")
    first, second = plain(), plain(learning_rates={".*embed_tokens": 1e-4})  # another place
    for model, made in (first, second, first):
        assert bits_of(model, made) == expected(model)
    assert not bnb.optim.GlobalOptimManager.get_instance().module_weight_config_triple


def test_projectors_go_where_their_matrices_are():
    """Torch moves tensors of a state alone, and a checkpoint is loaded on the CPU."""
    projector = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector(rank=2)
    projector.ortho_matrix = [torch.eye(2), torch.eye(3)]
    p = torch.nn.Parameter(torch.zeros(2, 3, device="meta"))
    optimizer = torch.optim.SGD([p])
    optimizer.state[p]["projector"] = projector
    projectors_to_devices(optimizer)
    assert [part.device.type for part in projector.ortho_matrix] == ["meta", "meta"]
    projectors_to_devices(object())  # as what stands for an optimizer with a sharded state


def test_settings_that_an_optimizer_does_not_have_are_refused():
    """Transformers drops them."""
    for name, known in (("galore_adamw", "proj_type"), ("apollo_adamw", "scale_type")):
        with pytest.raises(OptimizerError, match=rf"{name} has no setting 'rnak'; .*{known}"):
            check_optimizer(section(name, rnak=4))
        check_optimizer(section(name, rank=4))
    with pytest.raises(OptimizerError, match="galore_adafactor has no setting 'eps'"):
        check_optimizer(section("galore_adafactor", eps=1e-9))
    check_optimizer(section("adamw_torch", anything=4))
    for setting, value, wanted in (
        ("rank", "abc", "a whole number, at least 1"),
        ("rank", 0, "a whole number, at least 1"),
        ("eps", "small", "a number above 0"),
        ("scale_type", "chanel", "one of channel, tensor"),
        ("proj", "foo", "one of random, svd"),
        ("proj_type", "foo", "one of std, "),
    ):
        with pytest.raises(OptimizerError, match=f"settings.{setting} is {value!r}.*{wanted}"):
            check_optimizer(section("apollo_adamw", **{setting: value}))
    with pytest.raises(OptimizerError, match="flora needs rank"):
        check_optimizer(section("flora", update_proj_gap=4))


def section(optimizer, **settings):
    return TrainSection(output="run", steps=1, optimizer=optimizer, optimizer_settings=settings)
