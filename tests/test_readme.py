"""The README's example runs as it is printed, and its recipes and pages exist."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from velora_torch.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "layers compressed" in done.stdout
    assert (tmp_path / "trained" / "model.safetensors").is_file()


PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    here = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", here.read_text(encoding="utf-8"))
    for path, heading in links:
        target = here.parent / path if path else here
        assert target.exists(), path
        assert not heading or heading in anchors(target), f"{path}#{heading}"


def anchors(page: Path) -> list[str]:
    """What GitHub makes of the headings of a page: the ends of links to them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_recipes_open_with_their_command():
    for recipe in ROOT.glob("recipes/*.yaml"):
        first = recipe.read_text().splitlines()[0]
        assert first.startswith(f"# velora train recipes/{recipe.name}"), recipe.name


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("result_tables")


def test_results_are_those_of_the_rows(tables):
    pages = {place.page for place in tables.PLACES}
    assert pages == {
        "README.md",
        tables.ANALYSIS,
        tables.PRE_TRAINING,
        tables.LONGER,
        tables.DETAILS,
    }
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert tables.with_results(page, text) == text, (
            f"{page}: its tables are older than the rows: "
            "python benchmarks/result_tables.py --write"
        )


def test_the_page_of_recipes_has_todays_keys(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert importlib.import_module("recipe_keys").with_keys(page) == page, (
        "older than the sections: python benchmarks/recipe_keys.py --write"
    )
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "example.yaml").write_text(example, encoding="utf-8")
    assert load_recipe(tmp_path / "example.yaml").task == "text-classification"


def test_results_need_their_place(tables):
    (place,) = (place for place in tables.PLACES if place.page == "README.md")
    for wrong in ("", place.end + place.begin, 2 * README):
        with pytest.raises(ValueError, match="once each and in this order"):
            tables.with_results("README.md", wrong)


def test_pairs_of_methods_that_change_places(tables):
    turned_pairs = importlib.import_module("pretraining_tables").turned_pairs
    # d is in one of them alone; b and c change places
    first, second = {"a": 1, "c": 2, "b": 3, "d": 0}, {"a": 5, "b": 7, "c": 9}
    assert turned_pairs(first, second) == [("b", "c")]
    assert turned_pairs(second, first) == [("b", "c")]
    assert turned_pairs(first, first) == []
    assert turned_pairs({"a": 1, "b": 2}, {"a": 5, "b": 5}) == [("a", "b")]
