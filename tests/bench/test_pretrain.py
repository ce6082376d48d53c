"""`velora bench pretrain`: its recipes, a cell of each method on a tiny model, table and plots."""

from __future__ import annotations

import pytest

from tests.training.pretraining import texts
from velora_torch.bench import catalogue
from velora_torch.bench.cell import run_cell
from velora_torch.bench.grid import Cell, Finished, Row, cells
from velora_torch.bench.plot import Point
from velora_torch.bench.pretrain import protocol
from velora_torch.bench.pretrain.measure import peak_bytes
from velora_torch.bench.pretrain.plots import _frontier
from velora_torch.bench.pretrain.table import lines_of, report
from velora_torch.bench.timing import StepTime
from velora_torch.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NAMES = [variant.name for variant in protocol.VARIANTS]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    corpus = texts.save_jsonl(folder / "corpus.jsonl", texts.documents())
    return texts.save_config(folder / "small.json"), corpus


def tiny(sources, variant):
    """The bench's own recipe, on a model and a text that take a second."""
    config, corpus = sources
    made = protocol.local_recipe("llama-3m", variant, 0)
    made["model"], made["tokenizer"] = str(config), {"vocab_size": 360}
    made["data"] = {"train": str(corpus), "max_length": 32, "eval_fraction": 0.2}
    made["train"] |= {"tokens": 32 * 4 * 4, "batch_size": 4, "eval_every": 2}
    made["evaluate"]["max_examples"] = 8
    if made.get("lora"):
        made["lora"]["r"] = 4
    if variant == "relora":
        made["lora"]["restart_every"] = 2
    if "optimizer_settings" in made["train"]:
        made["train"]["optimizer_settings"] |= {"rank": 4}
    whole = Recipe.model_validate(made).model_dump(mode="json")
    return Cell("pretrain", "local", "llama-3m", variant, 0, whole)


@pytest.mark.parametrize("scale", ["local", "paper"])
def test_every_recipe_of_the_grid_is_valid(scale):
    bench = catalogue.BENCHES["pretrain"]
    grid = cells(bench, scale, bench.scales[scale].tasks, NAMES, 1)
    assert len(grid) == 2 * len(NAMES)
    recipes = [Recipe.model_validate(dict(cell.recipe)) for cell in grid]
    assert len({(r.token_budget(), r.model) for r in recipes}) == 2  # the same tokens for all


def test_the_long_scale_has_more_tokens_and_nothing_else():
    for name in NAMES:
        short = protocol.local_recipe("llama-3m", name, 0)
        long = protocol.long_recipe("llama-3m", name, 0)
        assert long["train"].pop("tokens") == 4 * short["train"].pop("tokens")
        assert long["train"].pop("eval_every") == 4 * short["train"].pop("eval_every")
        assert long == short


@pytest.mark.parametrize(("model", "ranks"), [("llama-60m", (128, 42)), ("llama-130m", (256, 64))])
def test_galore_has_its_published_settings(model, ranks):
    """Its ranks of 512 and 768; a smaller rank has no other rate or scale. Its eps is a variant."""
    for name, rank in zip(("galore", "galore-twelfth"), ranks, strict=True):
        train = protocol.paper_recipe(model, name, 0)["train"]
        assert train["learning_rate"] == 1e-2
        assert train["optimizer_settings"] == {"rank": rank, "update_proj_gap": 200, "scale": 0.25}
    assert protocol.paper_recipe(model, "lora", 0)["lora"]["r"] == ranks[0]
    relora = Recipe.model_validate(protocol.paper_recipe(model, "relora", 0))
    assert relora.steps() // relora.lora.restart_every == 4
    published = protocol.paper_recipe(model, "galore-packaged", 0)["train"]
    assert published == {**protocol.paper_recipe(model, "galore", 0)["train"], "eps": 1e-6}


def test_what_has_another_eps_says_so():
    """APOLLO has that of its package, and GaLore in variants; one of APOLLO has full training's."""
    for name in NAMES:
        train = protocol.local_recipe("llama-3m", name, 0)["train"]
        apollo = train["optimizer"] == "apollo_adamw"
        packaged = (apollo and "-eps" not in name) or "-packaged" in name
        assert train.get("eps", 1e-8) == (1e-6 if packaged else 1e-8), name
        own = train.get("optimizer_settings", {}).get("eps")
        assert own == (1e-8 if apollo else None), name


@pytest.mark.parametrize("name", ["galore", "galore-twelfth"])
def test_a_variant_has_the_rank_of_what_it_adds_to(name):
    packaged = protocol.local_recipe("llama-3m", f"{name}-packaged", 0)["train"]
    assert packaged == {**protocol.local_recipe("llama-3m", name, 0)["train"], "eps": 1e-6}


def test_all_methods_see_the_same_windows_model_and_schedule(sources):
    def shared(cell):
        train = {k: cell.recipe["train"][k] for k in ("tokens", "batch_size", "schedule", "seed")}
        return cell.recipe["data"], cell.recipe["model"], cell.recipe["tokenizer"], train

    first = shared(tiny(sources, "full"))
    assert all(shared(tiny(sources, name)) == first for name in NAMES)


@pytest.mark.parametrize("variant", NAMES)
def test_a_cell_of_each_method(sources, variant, tmp_path, monkeypatch):
    monkeypatch.setenv("VELORA_CACHE", str(sources[0].parent / "cache"))
    row = run_cell(tiny(sources, variant), "test", tmp_path)
    assert row.metric == "perplexity"
    assert 1 < row.score < 1000
    assert [point["tokens"] for point in row.details["curve"]] == [256, 512]
    assert row.details["peak_bytes"] > row.memory["weights"]
    assert set(row.details["text"]) == {"train", "eval"}
    full = run_cell(tiny(sources, "full"), "test", tmp_path) if variant != "full" else row
    smaller = {  # what the method is for
        "full-gc": "saved_activations",
        "full-8bit": None,  # small tensors keep 32 bits
        "lora": "gradients",
        "galore": "optimizer_state",
        "apollo": "optimizer_state",
        "flora": "optimizer_state",
        "velora-paper": None,  # gradients are dense, and the states are AdamW's
        "velora-all-each-step": "saved_activations",  # the rest is as large
    }.get(variant, "optimizer_state")
    if smaller is not None and variant != "full":
        assert row.memory[smaller] < full.memory[smaller]


def test_the_peak_is_that_of_the_precision_that_trains(sources, monkeypatch):
    monkeypatch.setenv("VELORA_CACHE", str(sources[0].parent / "cache"))
    recipe = Recipe.model_validate(dict(tiny(sources, "full").recipe))
    assert recipe.train.autocast
    mixed = peak_bytes(recipe)
    recipe.train.autocast = False
    assert peak_bytes(recipe) != mixed


TEXT = {"train": "a", "eval": "b"}


def row(variant, seed, score, peak=2**20):
    recipe = Recipe.model_validate(protocol.local_recipe("llama-3m", variant, seed))
    curve = [{"tokens": n * 10**6, "seconds": 1.0 * n, "perplexity": score + 9 / n} for n in (1, 2)]
    return Row(
        "pretrain",
        "local",
        "llama-3m",
        variant,
        seed,
        "x",
        "perplexity",
        score,
        memory={"saved_activations": 2**21, "gradients": 2**20, "optimizer_state": 2**20},
        details={"curve": curve, "tokens": 2 * 10**6, "peak_bytes": peak, "text": TEXT},
        recipe=recipe.model_dump(mode="json"),
        machine={"cpu": "test", "cores": 2},
    )


@pytest.fixture
def finished():
    scores = {"full": (20.0, 21.0, 22.0), "velora-all": (20.2, 21.42, 22.0)}
    rows = [row(name, s, score) for name, own in scores.items() for s, score in enumerate(own)]
    return Finished(protocol.PRETRAIN, "local", rows, [], 99)


def test_differences_are_paired_by_seed(finished):
    full, ours = lines_of(finished, "llama-3m")
    assert full.relative is None
    assert ours.relative.mean == pytest.approx((0.01 + 0.02 + 0.0) / 3)
    assert ours.perplexity.mean == pytest.approx(21.206666)
    assert [tokens for tokens, _ in ours.curve] == [1e6, 2e6]


def test_the_frontier_leaves_out_what_is_worse_in_both():
    at = [(3, 5.0), (1, 9.0), (2, 7.0), (2, 6.0), (4, 5.0), (5, 8.0)]
    points = [Point(f"v{i}", "", *place, 0.1, None) for i, place in enumerate(at)]
    assert _frontier(points) == [(1, 9.0), (2, 9.0), (2, 6.0), (3, 6.0), (3, 5.0)]


def test_the_report_has_a_table_and_its_plots(finished, tmp_path):
    text = report(finished, tmp_path)
    assert "| VeLoRA: all | 0.032, 0.002 | 21.21 ± 0.53 | +1.0 ± 0.6 % | 2.00 MiB |" in text
    assert "6 of 99 cells" in text
    for name in ("llama-3m_tokens", "llama-3m_memory"):
        assert f"({name}.png)" in text
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000
    assert "llama-3m_time" not in text  # nothing was timed


def test_times_of_one_session_are_compared(finished):
    """The machine was twice as slow in a later session that timed one variant alone."""
    times = finished.times
    times += [
        timed("full", "2026", 0.2),
        timed("velora-all", "2026", 0.16),
        timed("velora-all", "2027", 0.32),
    ]
    full, ours = lines_of(finished, "llama-3m")
    assert (full.ratio, ours.ratio) == (1.0, pytest.approx(0.8))
    assert ours.seconds == pytest.approx(0.16)
    tokens = 16 * 128
    assert ours.tokens_per_second == pytest.approx(tokens / 0.16)
    times += [timed("full", "2028", 0.5)]  # the ratio stays, seconds are of one session
    full, ours = lines_of(finished, "llama-3m")
    assert full.train_seconds == pytest.approx(2e6 / tokens * 0.5)
    assert ours.train_seconds == pytest.approx(2e6 / tokens * 0.4)
    assert ours.seconds == pytest.approx(0.4)
    assert ours.tokens_per_second == pytest.approx(tokens / 0.4)
    times[:] = [timed("velora-all", "2027", 0.32)]
    _, ours = lines_of(finished, "llama-3m")
    assert (ours.ratio, ours.seconds) == (None, 0.32)


def timed(variant, session, median):
    return StepTime(
        "pretrain",
        "local",
        "llama-3m",
        variant,
        "x",
        session,
        median=median,
        low=median,
        high=median,
        rounds=1,
        ratio=1.0,
        threads=2,
        machine={},
        versions={},
    )


def test_rows_of_different_text_are_told_apart(finished, tmp_path):
    """A package of text may have been upgraded between two runs of a bench."""
    assert "different texts" not in report(finished, tmp_path)
    finished.rows[4].details["text"] = TEXT | {"eval": "another"}
    text = report(finished, tmp_path)
    assert "have read 2 different texts" in text
    groups = text.split("within each:** ")[1].split(". Packages")[0].split("; ")
    assert groups[1] == "velora-all (seed 1)"
    assert groups[0].count("seed") == 5
