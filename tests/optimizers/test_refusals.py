"""Optimizers and settings that would not be exact are refused before anything changes."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

import velora_torch as velora
from velora_torch import optimizers
from velora_torch.optimizers import Rule

from .dense import batches, loss_of, pair, step, train_both, trainable


class SignedGradient(torch.optim.Optimizer):
    """Somebody's own optimizer: scale-invariant, with decoupled decay."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


class Renamed(AdamW):
    """No step of its own."""


class WithOwnStep(AdamW):
    def step(self, closure=None):
        return super().step(closure)


class Ranger(SignedGradient):
    """Registered through its base class."""


def refused(make, expected, model=None):
    """Assert that the first step raises and that nothing has changed; returns the message."""
    model = pair()[0] if model is None else model
    optimizer = make(trainable(model))
    loss_of(model, batches(1)[0]).backward()
    weights = copy.deepcopy(model.state_dict())
    coefs = [layer.coef.clone() for layer in (model.up, model.down, model.last)]
    state = copy.deepcopy(optimizer.state_dict())

    def closure():
        raise AssertionError("the loss was computed before the refusal")

    with pytest.raises(ValueError, match=expected) as error:
        optimizer.step(closure)
    with pytest.raises(ValueError, match=expected):
        optimizer.step(closure)  # still
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    for layer, coef in zip((model.up, model.down, model.last), coefs, strict=True):
        assert torch.equal(layer.coef, coef)
        assert layer.velora.steps == 0
    assert str(optimizer.state_dict()) == str(state)
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (torch.optim.Adafactor, "Adafactor .*rows and columns"),
        (torch.optim.LBFGS, "LBFGS .*several times"),
        (torch.optim.RAdam, "RAdam .*linear"),
        (torch.optim.Adadelta, "Adadelta .*eps"),
        (torch.optim.Rprop, "Rprop"),
        (torch.optim.ASGD, "ASGD"),
        (SignedGradient, "SignedGradient"),
        (WithOwnStep, "WithOwnStep .*changes the step of AdamW"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refused_by_name_with_advice(make, why):
    message = refused(functools.partial(make, lr=1e-3), why)
    assert "AdamW" in message
    assert "gradient='dense'" in message
    assert "register" in message


def test_muon_is_refused_by_name():
    model, _ = pair()
    optimizer = torch.optim.Muon([layer.coef for layer in (model.up, model.down, model.last)])
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"Muon .*orthogonalises"):
        optimizer.step()
    assert not optimizer.state


def test_the_adafactor_of_transformers_is_refused_by_name():
    transformers = pytest.importorskip("transformers")
    make = functools.partial(
        transformers.Adafactor, lr=1e-3, relative_step=False, scale_parameter=False
    )
    refused(make, "Adafactor .*rows and columns")


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(Adam, weight_decay=0.1),
        functools.partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        functools.partial(torch.optim.NAdam, weight_decay=0.1),
        functools.partial(torch.optim.Adamax, weight_decay=0.1),
        functools.partial(torch.optim.RMSprop, weight_decay=0.1),
        functools.partial(torch.optim.Adagrad, weight_decay=0.1),
    ],
    ids=lambda make: make.func.__name__,
)
def test_coupled_weight_decay_is_refused_with_advice(make):
    message = refused(make, f"{make.func.__name__} .*weight decay")
    assert "AdamW" in message
    assert "0.1" in message


def test_adagrad_with_a_first_accumulator_is_refused():
    make = functools.partial(torch.optim.Adagrad, initial_accumulator_value=0.1)
    refused(make, "initial_accumulator_value")


def test_a_setting_of_one_group_alone_is_found():
    def make(parameters):
        first, *rest = parameters
        groups = [{"params": [first]}, {"params": rest, "weight_decay": 0.2}]
        return Adam(groups)

    refused(make, r"weight decay \(0.2\)")


def test_settings_of_groups_without_coefficients_do_not_matter():
    model, _ = pair()
    norm = list(model.norm.parameters())
    others = [p for p in trainable(model) if all(p is not n for n in norm)]
    optimizer = Adam([{"params": norm, "weight_decay": 0.2}, {"params": others}])
    step(model, optimizer, batches(1)[0])


def test_other_optimizers_may_train_what_is_not_compressed():
    model, _ = pair()
    step(model, torch.optim.Adadelta(model.norm.parameters()), batches(1)[0])


def test_a_subclass_without_a_step_of_its_own_is_the_known_optimizer():
    assert train_both(pair(), functools.partial(Renamed, lr=3e-3, eps=1e-30)) < 1e-8


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(optimizers, "_registered", {})


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("kind", [SignedGradient, Ranger])
def test_a_registered_optimizer_is_accepted_with_its_subclasses(kind):
    optimizers.register(SignedGradient, Rule("sign", decoupled=lambda group: True))
    # The sign of a sum that rounds differently could differ: it does not in these steps.
    assert train_both(pair(), functools.partial(kind, lr=3e-3, weight_decay=0.1), 20) < 1e-12


@pytest.mark.usefixtures("registry")
def test_a_step_that_calls_its_base_class_counts_once():
    optimizers.register(WithOwnStep, optimizers._TORCH[AdamW])
    AdamW([torch.nn.Parameter(torch.zeros(1))])  # torch hooks a class when it is first used
    models = pair(fold_every=2)
    make = functools.partial(WithOwnStep, lr=3e-3, eps=1e-30, weight_decay=0.3)
    assert train_both(models, make, steps=7) < 1e-8
    assert models[0].up.velora.steps == 7


def test_an_optimizer_built_before_compress_is_an_error():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    optimizer = AdamW(model.parameters())
    velora.compress(model, velora.VeloraConfig(num_groups=2))
    weights = copy.deepcopy(model.state_dict())
    model(torch.randn(3, 8)).sum().backward()
    with pytest.raises(ValueError, match=r"before .*compress.*'[02]'.*after compress"):
        optimizer.step()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_an_optimizer_of_all_parameters_frozen_ones_too_is_fine():
    model, _ = pair()
    before = model.up.weight.detach().clone()
    step(model, AdamW(model.parameters()), batches(1)[0])
    assert not torch.equal(model.up.weight, before)


def test_an_optimizer_that_holds_coefficients_of_a_restored_model_is_an_error():
    model, _ = pair()
    optimizer = AdamW(trainable(model))
    step(model, optimizer, batches(1)[0])
    velora.restore(model)
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"restored.*Build the optimizer after"):
        optimizer.step()


def test_direction_of_pending_coefficients_is_not_mixed():
    model, _ = pair(fold_every=None)
    step(model, SGD(trainable(model), lr=0.1), batches(1)[0])
    adamw = AdamW(trainable(model))
    with pytest.raises(ValueError, match=r"pending coefficients along v.*fold"):
        step(model, adamw, batches(1)[0])
    assert not adamw.state
    velora.fold(model)
    step(model, adamw, batches(1)[0])


@pytest.mark.parametrize("decoupled", [True, False])
def test_deepspeeds_adam_is_taken_for_torchs(decoupled):
    """Its kernels have to be compiled; here is a class of their name that computes as they do."""
    base = AdamW if decoupled else torch.optim.Adam
    body = {"__module__": "deepspeed.ops.adam.fused_adam", "adam_w_mode": decoupled}
    kind = type("FusedAdam", (base,), {**body, "step": lambda self, closure=None: None})
    rule = optimizers.rule_for(kind([torch.nn.Parameter(torch.zeros(1))]))
    assert rule.direction == "sign"
    assert rule.moments == ("exp_avg",)
    assert rule.decay({"lr": 0.5, "weight_decay": 0.5}) == (0.75 if decoupled else 1.0)
    assert (rule.refuse({"weight_decay": 0.5}) is None) == decoupled
