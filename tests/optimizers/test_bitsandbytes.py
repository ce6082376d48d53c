"""bitsandbytes' optimizers on coefficients, on the CPU."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import velora_torch as velora
from velora_torch.integrations.bitsandbytes import take_overrides

from .dense import PaperLinear, step, trainable

pytest.importorskip("bitsandbytes")
# Its import may warn, and what it computes with may be compiled: neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore")

from bitsandbytes import functional as F  # noqa: E402
from bitsandbytes import optim as bnb  # noqa: E402

WIDTH, OUTPUTS, GROUPS = 62, 64, 16  # 16 groups of 4; the last has two features


@pytest.fixture(autouse=True)
def overriding(monkeypatch):
    """bitsandbytes' settings by parameter: none at first, and forgotten after the test.

    They are kept for the process, by a parameter's id and by its place in any optimizer: a Trainer
    that ran before, which wants 32 bits for embeddings, would leave some for the first place.
    """
    manager = bnb.GlobalOptimManager.get_instance()
    monkeypatch.setattr(manager, "pid2config", {})
    monkeypatch.setattr(manager, "index2config", {})
    return manager


def test_settings_of_its_parameters_come_along(overriding):
    one, other = nn.Linear(64, 64), nn.Linear(64, 64)
    for model in (one, other):
        overriding.override_config(model.weight, "optim_bits", 32)
    optimizer = bnb.AdamW8bit(one.parameters())
    take_overrides(optimizer, one)
    assert set(optimizer.mng.pid2config) == {id(one.weight)}
    assert set(overriding.pid2config) == {id(one.weight), id(other.weight)}


class Net(nn.Module):
    """One wide layer that is compressed, so that its states take several blocks of 256."""

    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.wide = linear(WIDTH, OUTPUTS)

    def forward(self, x):
        return self.wide(x)


def pair(**fields):
    torch.manual_seed(0)
    model, paper = Net(), Net(PaperLinear)
    paper.load_state_dict(model.state_dict())
    velora.compress(model, velora.VeloraConfig(num_groups=GROUPS, init="random", **fields))
    paper.wide.twin = (model.wide,)
    return model, paper


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(WIDTH, OUTPUTS, generator=generator) / 8
    inputs = [torch.randn(24, WIDTH, generator=generator) for _ in range(steps)]
    return [(x, x @ mix) for x in inputs]


def changes(make, steps=50, **fields):
    """Weight changes of the compressed model and of the dense reference."""
    models = pair(**fields)
    start = models[1].wide.weight.detach().clone()
    optimizers = [make(trainable(model)) for model in models]
    for batch in batches(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, batch)
    return [model.state_dict()["wide.weight"] - start for model in models]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("fold_every", [1, 4])
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(bnb.AdamW, lr=1e-3, eps=1e-20, weight_decay=0.1),
        functools.partial(bnb.Adam, lr=1e-3, eps=1e-20, weight_decay=0.1),
        functools.partial(bnb.RMSprop, lr=1e-3, eps=1e-20),
        functools.partial(bnb.Adagrad, lr=1e-3, eps=1e-20),
        functools.partial(bnb.SGD, lr=1e-1, momentum=0.9),
    ],
    ids=lambda make: make.func.__name__,
)
def test_32_bit_states_equal_the_dense_gradient(make, fold_every):
    ours, theirs = changes(make, fold_every=fold_every)
    assert relative(ours, theirs) < 1e-4


def test_lion_equals_the_dense_gradient_but_for_signs_of_rounding():
    make = functools.partial(bnb.Lion, lr=1e-3, weight_decay=0.1)
    ours, theirs = changes(make)
    # An entry whose sign is decided by float32 rounding moves by 2 lr of the 50 lr it can move.
    assert relative(ours, theirs) < 0.05
    assert float(((ours - theirs).abs() > 1e-5).float().mean()) < 0.02


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (bnb.AdamW8bit, {"lr": 1e-3, "weight_decay": 0.1}),
        (bnb.Lion8bit, {"lr": 1e-3, "weight_decay": 0.1}),
        (bnb.SGD8bit, {"lr": 1e-1, "momentum": 0.9}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_8_bit_states_are_as_near_to_32_bits_as_on_the_dense_gradient(kind, settings):
    exact = {bnb.AdamW8bit: bnb.AdamW, bnb.Lion8bit: bnb.Lion, bnb.SGD8bit: bnb.SGD}[kind]
    make = functools.partial(kind, **settings, min_8bit_size=1)
    ours, theirs = changes(make)
    truth = changes(functools.partial(exact, **settings))[1]
    assert relative(ours, truth) < 1.5 * relative(theirs, truth) + 0.01
    assert relative(ours, truth) < 0.3


def test_decay_is_that_of_the_dense_run():
    """Without a gradient signal in it, the weight is multiplied by (1 - lr decay)^steps."""
    model, _ = pair()
    start = model.wide.weight.detach().clone()
    optimizer = bnb.AdamW8bit(trainable(model), lr=0.1, weight_decay=0.5, min_8bit_size=1)
    for _ in range(3):
        model(torch.zeros(2, WIDTH)).sum().backward()
        model.wide.coef.grad.zero_()
        optimizer.step()
    torch.testing.assert_close(model.wide.raw_weight.detach(), start * 0.95**3)


def test_a_step_that_does_not_touch_version_counters_is_folded():
    model, _ = pair()
    optimizer = bnb.AdamW(trainable(model), lr=1e-2)
    before = model.wide.raw_weight.detach().clone()
    step(model, optimizer, batches(1)[0])
    assert not torch.equal(model.wide.raw_weight, before)
    assert not model.wide.coef.any()


@pytest.mark.parametrize("kind", [bnb.LAMB, bnb.LARS, bnb.LAMB8bit])
def test_trust_ratios_are_refused_by_name(kind):
    model, _ = pair()
    settings = {"momentum": 0.9} if kind is bnb.LARS else {}
    optimizer = kind(trainable(model), lr=1e-3, **settings)
    with pytest.raises(ValueError, match=f"{kind.__name__} .*norm of the weight.*AdamW"):
        step(model, optimizer, batches(1)[0])
    assert not optimizer.state


def test_what_is_not_known_to_be_exact_is_refused():
    class Own(bnb.AdamW):
        def update_step(self, group, p, gindex, pindex):
            p.sub_(p.grad / p.grad.norm())

    for kind in (bnb.AdEMAMix, Own):
        model, _ = pair()
        with pytest.raises(ValueError, match=kind.__name__):
            step(model, kind(trainable(model)), batches(1)[0])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (functools.partial(bnb.SGD, lr=0.1, momentum=0.9, weight_decay=0.1), "weight decay"),
        (functools.partial(bnb.RMSprop, weight_decay=0.1), "weight decay"),
        (functools.partial(bnb.Lion, lr=1e-3, is_paged=False), None),
    ],
    ids=["sgd", "rmsprop", "lion"],
)
def test_coupled_decay_is_refused(make, why):
    model, _ = pair()
    optimizer = make(trainable(model))
    if why is None:
        step(model, optimizer, batches(1)[0])
        return
    with pytest.raises(ValueError, match=f"{make.func.__name__} .*{why}"):
        step(model, optimizer, batches(1)[0])


def test_overridden_settings_of_one_parameter_are_followed(overriding):
    model, paper = pair()
    start = paper.wide.weight.detach().clone()
    for parameter in (model.wide.coef, paper.wide.weight):
        overriding.override_config(parameter, key_value_dict={"weight_decay": 0.5, "lr": 1e-2})
    for each in (model, paper):
        optimizer = bnb.AdamW(trainable(each), lr=1e-3, eps=1e-20)
        for batch in batches(10):
            if each is model:
                step(model, optimizer, batch)
            else:
                step(paper, optimizer, batch)
    ours, theirs = (m.state_dict()["wide.weight"] - start for m in (model, paper))
    assert relative(ours, theirs) < 1e-4


def test_overridden_settings_of_one_parameter_are_refused(overriding):
    model, _ = pair()
    overriding.override_config(model.wide.coef, "max_unorm", 0.1)
    with pytest.raises(ValueError, match="max_unorm"):
        step(model, bnb.AdamW(trainable(model)), batches(1)[0])


@pytest.mark.parametrize("kind", [bnb.AdamW8bit, bnb.SGD8bit, bnb.Lion8bit])
def test_8_bit_first_moments_are_projected_on_new_vectors(kind):
    model, _ = pair(refresh_every=3)
    settings = {"momentum": 0.9} if kind is bnb.SGD8bit else {}
    optimizer = kind(trainable(model), lr=1e-3, min_8bit_size=1, **settings)
    coef = model.wide.coef
    for batch in batches(2):
        step(model, optimizer, batch)
    old = model.wide.velora_vectors.clone()
    step(model, optimizer, batches(3)[2])
    before = copy.deepcopy(optimizer.state[coef])
    seen = {}
    optimizer.register_step_pre_hook(lambda o, *_: seen.update(copy.deepcopy(o.state[coef])))
    step(model, optimizer, batches(4)[3])
    new = model.wide.velora_vectors
    assert not torch.equal(old, new)

    def values(state):
        assert state["state1"].dtype == torch.uint8
        flat = F.dequantize_blockwise(
            state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256
        )
        return flat.view(OUTPUTS, GROUPS)

    dense_OGM = values(before)[:, :, None] * old
    due = (dense_OGM * new).sum(2)
    # Two neighbours of the 8-bit code are at most 1/64 of their block's largest number apart.
    bound = due.flatten().view(-1, 256).abs().amax(1, keepdim=True) / 64
    assert ((values(seen) - due).flatten().view(-1, 256).abs() <= bound).all()
    assert relative(values(seen), due) < 0.03
    for key in ("state2", "absmax2"):
        if key in before:
            assert torch.equal(seen[key], before[key])


def test_8_bit_state_round_trip():
    ends = []
    for reload in (False, True):
        model, _ = pair()
        make = functools.partial(bnb.AdamW8bit, lr=1e-3, min_8bit_size=1)
        optimizer = make(trainable(model))
        for number, batch in enumerate(batches(8)):
            if number == 4 and reload:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = make(trainable(model))
                optimizer.load_state_dict(saved)
            step(model, optimizer, batch)
        ends.append(model.state_dict()["wide.weight"])
    assert torch.equal(*ends)
