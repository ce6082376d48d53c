"""What happens in long runs: numbers that overflow, memory that runs out, signals."""

from __future__ import annotations

import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.training import tiny
from tests.training.pretraining import texts
from velora_torch import cli
from velora_torch.report.results import ModelInfo, Results, RunInfo, read_results
from velora_torch.training.manifest import damage
from velora_torch.training.nonfinite import NonFiniteError
from velora_torch.training.out_of_memory import OutOfMemoryError, is_out_of_memory
from velora_torch.training.recipe import RecipeError, load_recipe
from velora_torch.training.run import Options, run
from velora_torch.training.staging import checkpoints
from velora_torch.training.trainer import RecordingMixin

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Trained vocabularies are kept for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    corpus = texts.save_jsonl(folder / "corpus.jsonl", texts.documents())
    return texts.save_config(folder / "small.json", attention_dropout=0.2), corpus


@pytest.fixture
def recipe(sources, tmp_path):
    def make(output="run", **train):
        settings = {"tokens": 16 * 4 * 6, "accumulation": 1, "save_every": 2, **train}
        sections = {"train": settings, "velora": {"init": "running_average", "sub_token_size": 4}}
        quiet = {"before": False, "after": False}
        written = texts.recipe_dict(*sources, tmp_path / output, evaluate=quiet, **sections)
        return load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written))

    return make


def go(recipe, say=lambda line: None, **options):
    return run(recipe, Options(report=False, **options), say)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def during(monkeypatch):
    """Replace what the trainer does with a micro-batch; the function gets the real one too."""

    def install(function):
        real = RecordingMixin.training_step

        def training_step(self, model, inputs, *rest):
            return function(self, lambda: real(self, model, inputs, *rest), model, inputs)

        monkeypatch.setattr(RecordingMixin, "training_step", training_step)

    return install


# ------------------------------------------------------------------ NaN


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        return None

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


BAD = {
    "forward": (
        lambda y: y * float("nan"),
        r"the output of model\.layers\.1\.mlp\.down_proj \(.*Linear\) became non-finite, from a "
        r"finite input",
    ),
    "backward": (
        _BadGradient.apply,
        r"the gradient of the weight model\.layers\.1\.mlp\.down_proj\.coef became non-finite, "
        r"with a finite forward pass",
    ),
}


def bad_at(steps, change):
    """A layer goes wrong in some steps, whenever they are taken."""

    def step(trainer, real, model, inputs):
        if trainer.state.global_step + 1 not in steps:
            return real()
        layer = model.model.layers[1].mlp.down_proj
        forward = layer.forward
        layer.forward = lambda x: change(forward(x))
        try:
            return real()
        finally:
            del layer.forward

    return step


@pytest.mark.parametrize("kind", BAD)
def test_a_step_that_is_not_finite_stops_with_the_layer_named(recipe, tmp_path, kind):
    change, message = BAD[kind]
    with pytest.MonkeyPatch.context() as patch:
        real = RecordingMixin.training_step
        step = bad_at((4,), change)
        patch.setattr(
            RecordingMixin,
            "training_step",
            lambda s, m, i, *r: step(s, lambda: real(s, m, i, *r), m, i),
        )
        with pytest.raises(NonFiniteError, match=message) as caught:
            go(recipe())
    assert re.match(
        r"step 4: the loss is .*, the norm of the gradient (nan|inf)", str(caught.value)
    )
    assert "checkpoint-3 has what was learnt before it" in str(caught.value)
    assert "train.on_nonfinite: skip" in str(caught.value)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-2"]
    assert damage(tmp_path / "run/checkpoint-3") is None
    if kind == "forward":
        go(recipe(), resume=True)  # as if the layer had been repaired
        go(recipe("whole"))
        assert same(weights(tmp_path / "run/final"), weights(tmp_path / "whole/final"))


def test_a_skipped_step_changes_nothing_and_is_counted(recipe, tmp_path, during):
    during(bad_at((3, 5), BAD["forward"][0]))
    lines: list[str] = []
    settings = {"on_nonfinite": "skip", "save_every": 1, "keep": 9, "weight_decay": 0.1}
    results = go(recipe(**settings), lines.append)
    assert results.run.status == "finished"
    assert results.notes == ["not finite, so that nothing was learnt from them: steps 3, 5"]
    assert sum("skipped (1 of at most 10)" in line for line in lines) == 1
    assert sum("skipped (2 of at most 10)" in line for line in lines) == 1
    at = {path.name: weights(path) for path in checkpoints(tmp_path / "run")}
    assert same(at["checkpoint-2"], at["checkpoint-3"])
    assert same(at["checkpoint-4"], at["checkpoint-5"])
    assert not same(at["checkpoint-3"], at["checkpoint-4"])
    assert not same(at["checkpoint-5"], at["checkpoint-6"])
    moments = [
        torch.load(tmp_path / f"run/checkpoint-{n}/optimizer.pt", weights_only=True)["state"]
        for n in (2, 3)
    ]
    for key, state in moments[0].items():
        assert all(torch.equal(value, moments[1][key][name]) for name, value in state.items())


def test_skipping_has_a_limit_that_a_resumed_run_knows(recipe, tmp_path, during):
    during(bad_at((2, 4), BAD["forward"][0]))
    with pytest.raises(NonFiniteError, match=r"step 4: .*; 1 steps were skipped already"):
        go(recipe(on_nonfinite="skip", max_skipped=1))
    with pytest.raises(NonFiniteError, match="1 steps were skipped already"):
        go(recipe(on_nonfinite="skip", max_skipped=1), resume=True)


@pytest.mark.parametrize(
    ("save_every", "steps", "message"),
    [
        (1, 6, "step 2: 1 weights are not finite, such as .*; they are not saved"),
        (None, 6, "step 3: .*"),
        (None, 2, "after the last step: 1 weights are not finite, such as .*; they are not saved"),
    ],
)
def test_weights_that_are_not_finite_are_never_saved(
    recipe, tmp_path, monkeypatch, save_every, steps, message
):
    real, taken = torch.optim.AdamW.step, []

    def overflow(self, *rest):
        real(self, *rest)
        taken.append(self)
        if len(taken) == 2:
            next(p for g in self.param_groups for p in g["params"] if p.dim() == 1).data[0] = float(
                "inf"
            )

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(NonFiniteError, match=message) as caught:
        go(recipe(save_every=save_every, tokens=64 * steps))
    assert not (tmp_path / "run/final").exists()
    assert "norm.weight" in str(caught.value)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1"][: save_every or 0]


# ------------------------------------------------------------------ memory


def allocate_too_much():
    torch.empty(2**58, dtype=torch.int8)


def refuse():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def too_large(rows, fail, steps=None, micro=1):
    """Batches of so many examples do not fit: found out when the backward pass is nearly done."""
    seen = {"count": 0}

    def step(trainer, real, model, inputs):
        loss = real()
        number = trainer.state.global_step + 1
        if len(inputs["input_ids"]) >= rows and (steps is None or number in steps):
            seen["count"] += 1
            if seen["count"] >= micro:
                fail()
        return loss

    return step


@pytest.mark.parametrize("fail", [allocate_too_much, refuse])
def test_what_ran_out_is_said_by_category(recipe, tmp_path, during, fail):
    during(too_large(4, fail, steps=(3,)))
    with pytest.raises(OutOfMemoryError) as caught:
        go(recipe())
    message = str(caught.value)
    assert message.startswith("step 3: out of memory (")
    for part in ("weights", "gradients", "optimizer state", "saved activations of the first"):
        assert re.search(rf"{part}[ \w-]* \d[\d.]* \w?i?B", message), part
    assert "train.on_oom: shrink" in message
    assert "velora plan --model" in message
    assert checkpoints(tmp_path / "run")[0].name == "checkpoint-2"


def test_a_shrunk_run_is_bitwise_the_run_of_smaller_batches(recipe, tmp_path, during):
    go(recipe("small", batch_size=1, accumulation=8, tokens=16 * 8 * 3))
    during(too_large(2, allocate_too_much))
    lines: list[str] = []
    settings = {"batch_size": 4, "accumulation": 2, "tokens": 16 * 8 * 3}
    results = go(recipe(**settings, on_oom="shrink"), lines.append)
    said = [line for line in lines if "out of memory" in line]
    assert [re.search(r"cut into (\d)", line)[1] for line in said] == ["2", "4"]  # type: ignore[index]
    assert "a step still has 8" in said[0]
    assert results.notes == ["memory ran out: each micro-batch was cut into 4"]
    assert same(weights(tmp_path / "run/final"), weights(tmp_path / "small/final"))
    small = read_results(tmp_path / "small/results.json").history
    assert [p.loss for p in results.history] == pytest.approx([p.loss for p in small], rel=1e-4)


def test_memory_that_runs_out_within_a_step_costs_nothing(recipe, tmp_path, monkeypatch):
    """The second micro-batch of the third step: the first is taken again with it."""
    settings = {"batch_size": 4, "accumulation": 2, "tokens": 16 * 8 * 5, "on_oom": "shrink"}
    with monkeypatch.context() as patch:
        real = RecordingMixin.training_step
        failing = too_large(4, refuse, steps=(3,), micro=2)
        patch.setattr(
            RecordingMixin,
            "training_step",
            lambda s, m, i, *r: failing(s, lambda: real(s, m, i, *r), m, i),
        )
        go(recipe("whole", **settings))
        failing = too_large(4, refuse, steps=(3,), micro=2)

        def interrupt(line):
            if line.startswith("step 4/"):
                os.kill(os.getpid(), signal.SIGINT)

        assert go(recipe("parted", **settings), interrupt).run.status == "interrupted"
    resumed = go(recipe("parted", **settings), resume=True)  # it knows that it must cut
    assert resumed.notes == ["memory ran out: each micro-batch was cut into 2"]
    assert same(weights(tmp_path / "parted/final"), weights(tmp_path / "whole/final"))


def test_a_single_example_that_does_not_fit_ends_the_run(recipe, during):
    during(too_large(1, refuse))
    with pytest.raises(OutOfMemoryError, match="a micro-batch of 4 can't be cut any further"):
        go(recipe(on_oom="shrink"))


def test_memory_that_runs_out_in_the_optimizer_is_explained(recipe, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_: refuse())
    with pytest.raises(OutOfMemoryError, match="after step 0: out of memory in the optimizer's"):
        go(recipe(on_oom="shrink"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_about_memory(error, expected):
    assert is_out_of_memory(error) is expected
    with pytest.raises(RuntimeError) as caught:
        allocate_too_much()
    assert is_out_of_memory(caught.value)


# ------------------------------------------------------------------ signals


def test_a_signal_within_a_step_saves_what_was_before_it(recipe, tmp_path):
    settings = {"accumulation": 3, "tokens": 16 * 12 * 4, "save_every": 2}
    go(recipe("whole", **settings))
    with pytest.MonkeyPatch.context() as patch:
        real = RecordingMixin.training_step
        seen = []

        def step(trainer, model, inputs, *rest):
            seen.append(trainer.state.global_step + 1)
            if seen[-2:] == [4, 4]:  # the second of three micro-batches
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # launchers send it more than once
            return real(trainer, model, inputs, *rest)

        patch.setattr(RecordingMixin, "training_step", step)
        results = go(recipe(**settings))
    assert (results.run.status, results.run.signal) == ("interrupted", signal.SIGTERM)
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]  # not to the end of the step
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-2"]
    assert go(recipe(**settings), resume=True).run.status == "finished"
    assert same(weights(tmp_path / "run/final"), weights(tmp_path / "whole/final"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes_name_the_signal(recipe, tmp_path, monkeypatch, number, code):
    recipe()
    info = RunInfo("run", "interrupted", signal=int(number))
    monkeypatch.setattr(
        "velora_torch.training.run.run", lambda *_: Results(info, ModelInfo("m", 1, 1))
    )
    done = CliRunner().invoke(cli.app, ["train", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == code


# ------------------------------------------------------------------ the recipe


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"on_nonfinite": "ignore"}, "train.on_nonfinite"),
        ({"on_oom": "retry"}, "train.on_oom"),
        ({"max_skipped": 0}, "train.max_skipped"),
    ],
)
def test_settings_are_checked(recipe, train, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**train)
