"""`velora train` with task: pretrain, from end to end."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.training import tiny
from tests.training.pretraining import texts
from velora_torch.model import compressed_layers
from velora_torch.report.results import read_results, write_results
from velora_torch.training.assemble import assemble
from velora_torch.training.assets import AssetError
from velora_torch.training.data import check_sources
from velora_torch.training.exporting import export_run
from velora_torch.training.folder import FolderError
from velora_torch.training.recipe import RecipeError, load_recipe
from velora_torch.training.restarts import BASE_FILE
from velora_torch.training.run import Options, run
from velora_torch.training.sections import parse_count
from velora_torch.training.sources import DataError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Trained vocabularies and token files are kept for the module."""
    former = os.environ.get("VELORA_CACHE")
    os.environ["VELORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if former is None:
        del os.environ["VELORA_CACHE"]
    else:
        os.environ["VELORA_CACHE"] = former


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    corpus = texts.save_jsonl(folder / "corpus.jsonl", texts.documents())
    return texts.save_config(folder / "small.json"), corpus


@pytest.fixture
def recipe(sources, tmp_path):
    def _make(*overrides, output="run", **sections):
        written = texts.recipe_dict(*sources, tmp_path / output, **sections)
        return load_recipe(tiny.save_recipe(tmp_path / "recipe.yaml", written), overrides)

    return _make


def go(recipe, say=lambda line: None, **options):
    return run(recipe, Options(report=False, **options), say)


def interrupt(line):
    """Ctrl-C after the second step, given as what says how far a run is."""
    if line.startswith("step 2/"):
        os.kill(os.getpid(), signal.SIGINT)


def final(recipe):
    return load_file(f"{recipe.train.output}/final/model.safetensors")


def test_a_run_learns_and_leaves_a_plain_model(recipe):
    made = recipe("train.tokens=4k", evaluate={"max_examples": 20})
    results = go(made)
    assert results.before.metric == results.after.metric == "perplexity"
    assert results.after.score < 0.7 * results.before.score
    assert results.after.score == pytest.approx(math.exp(results.after.loss))
    assert made.data.shuffle is True
    assert set(results.run.data["digests"]) == {"train", "eval"}
    assert results.run.data["train_tokens"] == 62 * 64
    assert results.before.score == pytest.approx(360, rel=0.2)  # knows nothing of 360 tokens
    assert results.memory.gradients < results.memory.weights
    assert [point.step for point in results.history] == list(range(1, 63))  # 4000 // 64
    assert all(point.tokens_per_second > 0 for point in results.history)
    folder = f"{made.train.output}/final"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 360
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().padding_idx != tokenizer.eos_token_id  # which is learnt
    logits = model(**tokenizer("The cat sees the house.", return_tensors="pt")).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("velora", [None, {"sub_token_size": 4, "refresh_every": 2}])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(recipe, method, velora):
    """In mid-stream: the next window is the one that would have come."""
    more = {"lora": LORA} if method == "lora" else {}
    settings = {"method": method, "velora": velora, "train": {"accumulation": 2}, **more}
    resumed_ends_as_whole(recipe, settings)


@pytest.mark.parametrize("velora", [None, {"sub_token_size": 4, "refresh_every": 3}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_run_that_restarts_its_adapters_is_resumed_bitwise(recipe, every, dtype, velora):
    """Interrupted soon after step 2: after restarts, in one's way back, before the first."""
    lora = {**LORA, "restart_every": every, "restart_warmup": every // 2}
    settings = {"method": "lora", "velora": velora, "lora": lora, "dtype": dtype}
    resumed_ends_as_whole(recipe, settings)


@pytest.mark.parametrize("began", [False, True])
def test_restarts_are_neither_begun_nor_dropped_in_the_middle(recipe, began):
    """The weights under the adapters would be those of the start."""
    plain, restarting = {**LORA}, {**LORA, "restart_every": 2}
    train = {"save_every": 4, "save_final": False}
    first, then = (restarting, plain) if began else (plain, restarting)
    go(recipe("train.tokens=512", method="lora", lora=first, train=train))
    word, other = ("with", "none") if began else ("without", "one")
    message = rf"is of a run {word} lora\.restart_every, and this recipe has {other}: set it as"
    with pytest.raises(ValueError, match=message):
        go(recipe("train.tokens=512", method="lora", lora=then, train=train), resume=True)


@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")
@pytest.mark.parametrize(
    "optimizer", ["galore_adamw", "apollo_adamw", "flora", "adamw_bnb_8bit", "adamw_torch_fused"]
)
def test_optimizers_go_on_with_their_states(recipe, optimizer):
    """GaLore's and APOLLO's hold objects besides tensors; one kind of layer is compressed."""
    pytest.importorskip(
        f"{optimizer.partition('_')[0]}_torch" if "_adamw" in optimizer else "torch"
    )
    if "bnb" in optimizer:
        pytest.importorskip("bitsandbytes")
    train = {"optimizer": optimizer}
    if "adamw_" not in optimizer:
        train["optimizer_settings"] = {"rank": 4, "update_proj_gap": 3}
    compressed = {"sub_token_size": 4, "targets": ["down_proj"]}
    resumed_ends_as_whole(recipe, {"velora": compressed, "train": train})


def resumed_ends_as_whole(recipe, settings):
    whole = recipe("train.tokens=768", output="whole", **settings)
    go(whole)
    parted = recipe("train.tokens=768", output="parted", **settings)

    assert go(parted, interrupt).run.status == "interrupted"
    assert go(parted, resume=True).run.status == "finished"
    expected, found = final(whole), final(parted)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_two_runs_of_a_seed_are_equal_and_another_seed_is_not(recipe):
    first, second = recipe(output="a"), recipe(output="b")
    other = recipe("train.seed=1", output="c")
    for made in (first, second, other):
        go(made)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(final(first)[name], final(second)[name])
    assert not torch.equal(final(first)[name], final(other)[name])


def test_the_order_of_windows_does_not_depend_on_the_method(recipe):
    plain = assemble(recipe(velora=None), lambda line: None).data.train
    lora = assemble(recipe(method="lora", lora=LORA), lambda line: None).data.train
    assert len(plain) == len(lora) == 24
    for index in range(len(plain)):
        assert torch.equal(plain[index]["input_ids"], lora[index]["input_ids"])


def test_other_recipes_in_the_cache_do_not_move_the_windows(recipe, tmp_path):
    """A file of the whole text, say, which an earlier run with epochs has left."""
    text = {"train": str(texts.save_jsonl(tmp_path / "long.jsonl", texts.documents(700)))}

    def order():
        made = recipe("train.tokens=640", velora=None, data=text)
        data = assemble(made, lambda line: None).data
        return [row["input_ids"].tolist() for row in data.train], data.stats["digests"]

    first = order()
    whole = recipe("train.epochs=1", velora=None, data=text, train={"tokens": None})
    stats = assemble(whole, lambda line: None).data.stats
    assert stats["digests"]["train"] != first[1]["train"]  # it has more than the budget's
    assert order() == first


def test_a_run_is_not_resumed_on_other_windows(recipe, tmp_path):
    corpus = texts.save_jsonl(tmp_path / "grows.jsonl", texts.documents(600))

    def made(*overrides):
        return recipe("train.tokens=768", *overrides, data={"train": str(corpus)}, velora=None)

    go(made(), interrupt)
    for overrides, message in (
        (["data.max_length=32"], r"data\.max_length has changed \(16 -> 32\)"),
        (["train.seed=1"], r"train\.seed has changed \(0 -> 1\)"),
        (["train.batch_size=8"], r"tokens of a step .* has changed \(64 -> 128\)"),
        (["train.tokens=60k"], r"the budget .* has changed"),
    ):
        with pytest.raises(DataError, match=message):
            go(made(*overrides), resume=True)
    before = corpus.read_text()
    texts.save_jsonl(corpus, texts.documents(700))
    with pytest.raises(DataError, match="the text, the vocabulary that was trained on it"):
        go(made(), resume=True)
    corpus.write_text(before)
    older = read_results(tmp_path / "run/results.json")  # a release that did not say as much
    del older.run.data["step_tokens"], older.run.data["digests"]
    write_results(older, tmp_path / "run/results.json")
    with pytest.raises(DataError, match=r"train\.seed has changed"):
        go(made("train.seed=1"), resume=True)
    results = go(made("train.batch_size=2", "train.accumulation=2"), resume=True)
    assert results.run.status == "finished"
    seconds = [point.seconds for point in results.history]
    assert seconds == sorted(seconds)  # counted on from those of the former part
    assert [point.step for point in results.history] == list(range(1, 13))


def test_settings_are_compared_before_any_text_is_read(recipe, tmp_path, monkeypatch):
    """With train.steps a step's size moves the budget, and so all tokens: that is not the news."""
    text = {"train": str(texts.save_jsonl(tmp_path / "long.jsonl", texts.documents(600)))}

    def made(*overrides):
        return recipe("train.steps=600", *overrides, data=text, velora=None)

    go(made(), interrupt)
    monkeypatch.setattr("velora_torch.training.run.prepare_data", None)
    with pytest.raises(DataError, match=r"the tokens of a step .* has changed \(64 -> 128\)"):
        go(made("train.batch_size=8"), resume=True)
    with pytest.raises(DataError, match=r"data\.max_length has changed \(16 -> 32\)"):
        go(made("data.max_length=32"), resume=True)


def test_a_token_file_that_has_lost_its_description_is_made_anew(recipe):
    first = assemble(recipe(velora=None), lambda line: None).data.stats["digests"]
    found = list(Path(os.environ["VELORA_CACHE"], "tokens").rglob("about.json"))
    assert found
    for file in found:
        file.unlink()
    assert assemble(recipe(velora=None), lambda line: None).data.stats["digests"] == first


def test_lora_trains_what_it_does_not_adapt_and_is_merged(recipe, tmp_path):
    made = recipe(method="lora", lora=LORA)
    model = assemble(made, lambda line: None).model
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for part in ("embed_tokens", "lm_head", "input_layernorm", "model.norm", "lora_B"):
        assert any(part in name for name in trained), part
    assert not any("base_layer" in name for name in trained)
    go(made)
    merged = transformers.AutoModelForCausalLM.from_pretrained(f"{made.train.output}/final")
    assert not hasattr(merged, "peft_config")
    with pytest.raises(FolderError, match="has no base to lie on"):
        export_run(tmp_path / "run", tmp_path / "adapter", lora=True)
    export_run(tmp_path / "run", tmp_path / "plain", lora=False)
    exported = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(t, exported[n]) for n, t in final(made).items())


def test_lora_of_a_tied_model_is_refused(recipe, tmp_path):
    tied = texts.save_config(tmp_path / "tied.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="output head is its embedding"):
        assemble(recipe(model=str(tied), method="lora", lora=LORA), lambda line: None)


def test_an_interrupted_lora_run_can_be_exported(recipe, tmp_path):
    made = recipe(method="lora", lora=LORA)

    go(made, interrupt)
    export_run(tmp_path / "run", tmp_path / "plain", lora=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.config.vocab_size == 360


def test_what_restarts_have_merged_is_in_an_interrupted_runs_export(recipe, tmp_path):
    """The random base that the run began with is not under its adapters any more."""
    lora = {**LORA, "restart_every": 1, "restart_warmup": 0}
    made = recipe(method="rslora", lora=lora)
    go(made, interrupt)
    with pytest.raises(FolderError, match="an adapter has no base to lie on"):
        export_run(tmp_path / "run", tmp_path / "adapter", lora=True)
    export_run(tmp_path / "run", tmp_path / "plain", lora=False)
    exported = load_file(tmp_path / "plain" / "model.safetensors")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    base = load_file(checkpoint / BASE_FILE)
    assert len(base) == 14  # seven layers of two blocks
    for name, weight in base.items():  # new adapters add nothing yet
        assert torch.equal(weight, exported[name]), name
    random = assemble(made, lambda line: None).model.get_base_model().state_dict()
    for name, weight in base.items():
        begun = random[name.replace(".weight", ".base_layer.weight")]
        assert not torch.equal(weight, begun), name


@pytest.mark.parametrize("preset", ["llama-3m", "llama-15m"])
def test_small_presets_have_the_size_of_their_names(preset):
    from velora_torch.memory.simulator.presets import preset as configuration

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(configuration(preset))
    blocks = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    millions = int(preset.removeprefix("llama-").removesuffix("m"))
    assert blocks / 1e6 == pytest.approx(millions, rel=0.06)


def test_any_causal_architecture_and_a_given_tokenizer(recipe, tmp_path):
    tiny.save_model(tmp_path / "other")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32)
    config.to_json_file(tmp_path / "gpt2.json", use_diff=False)
    made = recipe(model=str(tmp_path / "gpt2.json"), tokenizer=None, velora={"sub_token_size": 8})
    made = made.model_copy(
        update={"tokenizer": type(made.tokenizer)(source=str(tmp_path / "other"))}
    )
    assembled = assemble(made, lambda line: None)
    assert assembled.model.config.vocab_size == 14
    assert compressed_layers(assembled.model)


def test_checkpointing_recompute_chunked_loss_and_autocast_go_together(recipe):
    settings = {"gradient_checkpointing": True, "recompute": True, "chunked_loss": True}
    results = go(recipe(train={**settings, "autocast": True, "eval_every": 3}))
    assert results.after.score < results.before.score
    assert [e.step for e in results.evaluations] == [3, 6]


@pytest.mark.parametrize(
    ("text", "count"), [("100M", 10**8), ("2.5b", 25 * 10**8), ("7k", 7000), (" 12 ", 12)]
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": "qlora"}, "`method` has no sense with task: pretrain; known: full, lora"),
        ({"data": {"packing": True}}, "`data.packing` has no effect with task: pretrain"),
        ({"data": {"format": "chat"}}, "`data.format` must be text with task: pretrain"),
        ({"train": {"tokens": "many"}}, "is not a number of tokens such as 100M"),
        ({"train": {"tokens": 60}}, "less than one step takes, which is 64 tokens"),
        ({"train": {"steps": 3}}, "set train.steps or train.tokens, not both"),
        ({"train": {"head_learning_rate": 1e-3}}, "is for tasks with a head"),
        ({"evaluate": {"perplexity": "pydoc"}}, "`evaluate.perplexity` is not for task: pretrain"),
        ({"evaluate": {"metric": "choice"}}, "is not a metric of task: pretrain"),
        ({"tokenizer": {"vocab_size": 20}}, "a number greater than or equal to 320"),
        ({"tokenizer": {"vocab_size": 360, "source": "x"}}, "no effect with tokenizer.source"),
        ({"task": "language-modeling"}, "`tokenizer` is for task: pretrain"),
        (
            {
                "task": "language-modeling",
                "tokenizer": None,
                "data": {"shuffle": False},
                "train": {"tokens": None, "steps": 3},
            },
            r"`data.shuffle` is for task: pretrain; train.seed shuffles",
        ),
        (
            {"method": "dora", "lora": {"restart_every": 2}},
            r"`lora.restart_every` is for method: lora or rslora, not dora",
        ),
        (
            {"method": "lora", "lora": {"restart_every": 400}},
            r"`lora.restart_every` must be less than the steps of the run, which are \d+",
        ),
        (
            {"method": "lora", "lora": {"restart_every": 2, "restart_warmup": 2}},
            r"`lora.restart_warmup` must be less than lora.restart_every, which is 2",
        ),
        (
            {"method": "lora", "lora": {"restart_warmup": 2}},
            r"`lora.restart_warmup` has no effect without lora.restart_every",
        ),
        (
            {
                "task": "language-modeling",
                "tokenizer": None,
                "method": "lora",
                "lora": {"restart_every": 2},
                "train": {"tokens": None, "steps": 3},
            },
            r"`lora.restart_every` is for task: pretrain: restarts change the weights under",
        ),
        ({"memory_budget": "1GiB"}, "`memory_budget` cannot be planned for task: pretrain"),
    ],
)
def test_recipes_that_make_no_sense(recipe, sections, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**sections)


def test_sources_are_checked_before_anything_is_read(recipe, tmp_path, monkeypatch):
    check_sources(recipe())
    with pytest.raises(AssetError, match="did you mean llama-60m"):
        check_sources(recipe(model="lama-60m"))
    with pytest.raises(AssetError, match="is a vit, and transformers has no causal"):
        check_sources(recipe(model="vit-b-16"))
    with pytest.raises(DataError, match=r"the context of .* is 128 tokens; set data\.max_length"):
        check_sources(recipe("train.steps=1", data={"max_length": 256}))
    with pytest.raises(DataError, match="no such file"):
        check_sources(recipe(data={"train": str(tmp_path / "none.jsonl")}))
    with pytest.raises(DataError, match=r"corpus\.jsonl has no splits, which hub data sets have"):
        check_sources(recipe("data.eval_split=validation"))
    made = recipe()
    made.data.eval = made.data.train
    with pytest.raises(DataError, match="the text to train on would be held out"):
        check_sources(made)
    with pytest.raises(DataError, match="0 holds out no document"):
        check_sources(recipe(data={"eval_fraction": 0.0}))
    with pytest.raises(AssetError, match="no model folder"):
        check_sources(recipe("tokenizer.source=./none"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"allenai/c5.*could not be reached"):
        check_sources(recipe(data={"train": "allenai/c5"}))


def test_a_copy_of_the_text_is_not_held_out(recipe, tmp_path):
    """Also where the two are read to different lengths."""
    made = recipe("train.tokens=256")
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(Path(made.data.train).read_bytes())
    made.data.eval = str(copied)
    with pytest.raises(DataError, match="the text that is held out is the text to train on"):
        go(made)


def test_empty_text_is_named(recipe, tmp_path):
    made = recipe()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    made.data.eval = str(empty)
    with pytest.raises(DataError, match=r"empty\.jsonl: there is no document in it"):
        go(made)


def test_too_little_text_is_told(recipe, tmp_path):
    short = texts.save_jsonl(tmp_path / "short.jsonl", ["a few words"] * 3 + ["others"] * 3)
    with pytest.raises(DataError, match=r"are needed at least|no document is"):
        go(recipe(data={"train": str(short), "max_length": 64}))
