"""Every variant trains: finite numbers, weights that move, and the FLOPs that it should have."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("pydantic")

import torch
from torch import nn

from tests.bench.speed import tiny
from velora_torch.bench.speed import cases as cases_room
from velora_torch.bench.speed import prepare as prepare_room
from velora_torch.bench.speed.cases import CASES, LARGE, LOCAL, cases_of, preset
from velora_torch.bench.speed.parts import prepare_part
from velora_torch.bench.speed.prepare import add_lora, prepare
from velora_torch.bench.speed.variants import FULL, GROUPS, LORA, PARTS, RANK, variants_of
from velora_torch.bench.speed.workload import build
from velora_torch.layers import CompressedLayer
from velora_torch.subtoken import folding
from velora_torch.subtoken.kernels.fold import fold_native_

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::velora_torch.memory.freed.TargetWarning"),
]

T, D, O, G = tiny.TOKENS, tiny.WIDTH, tiny.WIDTH, GROUPS  # noqa: E741
PRODUCT = 2 * T * D * O
FLOPS = {  # of a square layer: the forward pass, dX, and what stands in for dW
    "plain": 3 * PRODUCT,
    "reconstruct": 3 * PRODUCT + 2 * T * D,
    "dense": 2 * PRODUCT + 2 * T * D + 2 * T * O * G,
    "factored": 2 * PRODUCT + 2 * T * D + 2 * T * O * G,
}


def named(name):
    return next(variant for variant in [*FULL, *LORA] if variant.name == name)


@pytest.fixture(scope="module")
def layer():
    return build(tiny.LAYER)


@pytest.fixture(scope="module")
def model():
    return build(tiny.MODEL)


class Parameters:
    """Remembers the model that a variant trains."""

    def __init__(self, monkeypatch):
        real, self.models = torch.optim.AdamW, []
        self.optimizers = []

        def make(parameters, **settings):
            self.optimizers.append(real(parameters, **settings))
            return self.optimizers[-1]

        monkeypatch.setattr(prepare_room.torch.optim, "AdamW", make)

    def trained(self):
        return [p for group in self.optimizers[-1].param_groups for p in group["params"]]


@pytest.mark.parametrize("variant", [v for v in FULL if not v.compiled], ids=lambda v: v.name)
def test_variants_of_a_model_train(variant, model):
    before = [p.detach().clone() for p in model.model.parameters()]
    one = prepare(variant, model)
    first = one.result().clone()
    for _ in range(4):
        one.step()
    assert torch.isfinite(one.result()).all()
    assert one.result() < first  # always the same batch
    for p, q in zip(model.model.parameters(), before, strict=True):
        assert torch.equal(p, q)  # variants are made from copies


@pytest.mark.parametrize("variant", [v for v in FULL if v.velora], ids=lambda v: v.name)
def test_variants_start_from_the_same_weights(variant, model):
    assert torch.equal(prepare(variant, model).result(), prepare(FULL[0], model).result())


@pytest.mark.parametrize("name", FLOPS)
def test_flops_of_a_layer(name, layer):
    assert prepare(named(name), layer).flops == FLOPS[name]
    assert FLOPS["factored"] < FLOPS["plain"]


def test_flops_of_a_factored_model_are_below_by_the_products_of_its_linear_layers(model):
    saved = 0
    for module in model.model.model.modules():  # the head stays exact
        if isinstance(module, nn.Linear):
            tokens = model.inputs["input_ids"].numel()
            features, outputs = module.in_features, module.out_features
            saved += 2 * tokens * (features * outputs - outputs * G - features)
    assert prepare(named("plain"), model).flops - prepare(named("factored"), model).flops == saved


def test_saved_activations_of_a_layer(layer):
    assert prepare(named("plain"), layer).saved == T * D * 2  # bytes of bfloat16
    assert prepare(named("factored"), layer).saved == T * G * 2
    compiled = next(variant for variant in FULL if variant.compiled)
    assert prepare(compiled, layer).saved is None


def test_saved_activations_of_a_model(model):
    saved = {v.name: prepare(v, model).saved for v in FULL if not v.compiled}
    assert saved["factored-m8"] < saved["plain"]
    assert saved["factored+gc"] < saved["factored+recompute"] < saved["factored"]


def test_logits_that_are_computed_again_are_counted(model):
    """By one more product of the head, and not among what is saved."""
    plain, again = (prepare(named(name), model) for name in ("factored", "factored+recompute"))
    head = model.model.lm_head
    rows = model.inputs["input_ids"].numel()
    assert again.flops - plain.flops == 2 * rows * head.in_features * head.out_features
    assert again.saved < plain.saved - rows * head.out_features * 4  # bytes of float32


def test_flops_of_attention_and_of_recomputation_count(model):
    plain = prepare(named("plain"), model).flops
    tokens = model.inputs["input_ids"].numel()
    linear = sum(
        6 * tokens * m.in_features * m.out_features
        for m in model.model.modules()
        if isinstance(m, nn.Linear)
    )
    assert plain > linear
    assert prepare(named("plain+gc"), model).flops > plain


@pytest.mark.parametrize("variant", LORA, ids=lambda v: v.name)
def test_variants_of_lora_train(variant):
    workload = build(tiny.LORA_LAYER)
    one = prepare(variant, workload)
    first = one.result().clone()
    one.step()
    one.step()
    assert torch.isfinite(one.result()).all()
    assert not torch.equal(one.result(), first)


@pytest.mark.parametrize("casts", [True, False], ids=["casts", "no-casts"])
@pytest.mark.parametrize("own", [True, False], ids=["peft-velora", "lora"])
def test_adapters(casts, own, model):
    import copy

    adapted = add_lora(copy.deepcopy(model.model), casts, own)
    sizes = {n: p for n, p in adapted.named_parameters() if "lora_A" in n}
    assert len(sizes) == 2 * 7
    expected = torch.float32 if casts else torch.bfloat16
    assert {p.dtype for p in sizes.values()} == {expected}
    assert {p.shape[0] for p in sizes.values()} == {RANK}
    layer = adapted.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert hasattr(layer, "lora_velora_embed") == own
    if own:
        assert layer.lora_velora_num_groups["default"] == GROUPS


def test_ours_compresses_every_adapter(model, monkeypatch):
    import copy

    made = prepare_room._apply(named("lora+velora"), copy.deepcopy(model.model))
    layers = [n for n, m in made.named_modules() if isinstance(m, CompressedLayer)]
    assert len(layers) == 2 * 7
    assert all("lora_A" in name for name in layers)


def test_the_optimizer_trains_coefficients_alone_and_states_have_their_type(layer, monkeypatch):
    seen = Parameters(monkeypatch)
    prepare(named("plain"), layer)
    assert [(p.shape, p.dtype) for p in seen.trained()] == [((O, D), torch.bfloat16)]
    state = seen.optimizers[-1].state[seen.trained()[0]]
    assert state["exp_avg"].dtype == torch.bfloat16
    prepare(named("factored"), layer)
    assert [(p.shape, p.dtype) for p in seen.trained()] == [((O, G), torch.float32)]
    assert all(p.grad is None for p in seen.trained())


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_parts(part, layer):
    one = prepare_part(part, layer)
    one.step()
    assert torch.isfinite(one.result()).all()


@pytest.mark.parametrize(
    ("part", "other"), [("factor", "factor-rows"), ("siblings-apart", "siblings-together")]
)
def test_two_ways_to_compute_a_part_agree(part, other, layer):
    found = []
    for name in (part, other):
        (one,) = [candidate for candidate in PARTS if candidate.name == name]
        prepared = prepare_part(one, layer)
        prepared.step()
        found.append(prepared.result())
    torch.testing.assert_close(*found)


def test_flops_of_the_parts_add_up_to_those_of_the_step(layer):
    flops = {part.name: prepare_part(part, layer).flops for part in PARTS}
    inside = [part.name for part in PARTS if part.side == "ours"][1:]
    assert flops["step"] == sum(flops[name] for name in inside)
    assert flops["factor"] * D == flops["weight-gradient"] * G


@pytest.mark.parametrize(("name", "native"), [("factored", True), ("factored-operators", False)])
def test_who_folds(name, native, layer, monkeypatch):
    """C, where there is a compiler, but in the variant that is there to compare with it."""
    done = []

    def watched(*operands):
        done.append(fold_native_(*operands))
        return done[-1]

    monkeypatch.setattr(folding, "fold_native_", watched)
    one = prepare(named(name), layer)
    assert done == [False]  # the step that FLOPs are counted in
    one.step()
    assert done[1:] == [native and shutil.which("cc") is not None]


def test_a_compiled_variant_is_one_graph(layer, monkeypatch):
    real, asked = torch.compile, []

    def stand_in(model, **settings):
        asked.append(settings)
        return real(model, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", stand_in)
    torch.compiler.reset()
    one = prepare(named("factored+compile"), layer)
    eager = prepare(named("factored"), layer)
    for _ in range(3):
        one.step()
        eager.step()
    torch.compiler.reset()
    assert asked == [{"fullgraph": True}]
    assert torch.equal(one.result(), eager.result())
    assert one.flops == FLOPS["factored"]


# ------------------------------------------------------------------ cases


def test_names_are_unique_and_every_local_case_is_in_the_large_scale():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {case.name for case in cases_of(LOCAL)} < {case.name for case in cases_of(LARGE)}
    for level in ("layer", "model", "parts"):
        assert any(case.level == level for case in cases_of(LOCAL))


def test_the_grid_of_layers_is_whole():
    settings = [case.settings for case in cases_room.LAYERS]
    assert {s["features"] for s in settings} == {512, 1024, 2048, 4096, 8192}
    assert {s["tokens"] for s in settings} == {512, 1024, 2048, 4096, 8192}
    assert {s["dtype"] for s in settings} == {"bfloat16", "float32"}
    assert len(settings) == 50


def test_the_first_variant_is_the_base():
    firsts = {
        case.name: variants_of(case)[0].name
        for case in (tiny.MODEL, tiny.LAYER, tiny.LORA_LAYER, tiny.PARTS)
    }
    assert firsts == {"model": "plain", "layer": "plain", "layer-lora": "lora", "parts": "step"}
    assert not any("gc" in variant.name for variant in variants_of(tiny.LAYER))


@pytest.mark.parametrize("name", ["vit-b-16", "roberta-base", "smollm2-135m-instruct"])
def test_presets_without_dropout(name):
    from velora_torch.bench.speed.workload import _config

    config = _config(preset(name, 1, 8, num_hidden_layers=1))
    assert config.num_hidden_layers == 1
    assert getattr(config, "hidden_dropout_prob", 0.0) == 0.0
    assert getattr(config, "attention_dropout", 0.0) == 0.0
    assert not config.use_cache


@pytest.mark.parametrize("name", ["vit-b-16", "roberta-base"])
def test_other_architectures_train(name):
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
    small |= {"num_attention_heads": 2}
    small |= {"image_size": 32} if name == "vit-b-16" else {"vocab_size": 64}
    case = dataclasses.replace(tiny.MODEL, settings=preset(name, 2, 8, **small))
    for variant in ("plain", "factored"):
        one = prepare(named(variant), build(case))
        one.step()
        assert torch.isfinite(one.result()).all()
