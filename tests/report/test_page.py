import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from velora_torch.report import page, plots
from velora_torch.report.results import ComparisonRow, Evaluation, HistoryPoint, Memory, Quality

from .samples import bare, full, full_of

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

HOSTILE = "<script>alert('$x_1$ & \"y\"')</script>"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, ids, addresses and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src"):
                self.addresses.append(value)
            assert not name.startswith("on")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def without_comparison(results):
    results.compare = []


def without_evaluation(results):
    results.before = results.after = None
    results.evaluations = []


def interrupted(results):
    results.run.status = "interrupted"
    results.history = results.history[:1]


def plain(results):
    results.model.compressed_layers = {}
    results.compare = []


def one_variant(results):
    del results.compare[1:]


def no_finite_loss(results):
    for point in results.history:
        point.loss = math.nan
    results.evaluations = []


def nothing_measured(results):
    results.memory = None
    results.compare = [ComparisonRow("plain AdamW"), ComparisonRow("VeLoRA")]


def partly_measured(results):
    results.compare = []
    results.memory = Memory(weights=100, gradients=0)


def loss_only(results):
    results.before = Quality(loss=3.0)
    results.after = Quality(loss=2.0)


def unmeasured_quality(results):
    results.before = results.after = Quality()


CHANGES = [
    without_comparison,
    without_evaluation,
    interrupted,
    plain,
    one_variant,
    no_finite_loss,
    nothing_measured,
    partly_measured,
    loss_only,
    unmeasured_quality,
]


def test_the_page_holds_every_part(tmp_path):
    page.write_report(full(), tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    for part in (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "18.4% → 89.4%",
        "on 500 examples, chance 16.7%",
        "56% less",
        "0.79×",
        "612 MiB",
        "model.layers.*.self_attn.q_proj",
        "tied to model.embed_tokens",
        "targets: all-linear",
        "velora train recipes/demo.yaml",
        "Example CPU @ 2.5GHz, 2 cores",
        "2.14.1",
    ):
        assert part in text, part
    assert "Interrupted" not in text


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_pages_of_runs_that_lack_parts(change):
    results = full()
    change(results)
    text = Page(page.render_report(results)).text
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert ("Interrupted." in text) == (change is interrupted)
    assert ("trained exactly" in text) == (change is plain)


def test_page_of_a_run_of_which_nothing_is_known():
    text = Page(page.render_report(bare())).text
    assert "No step of this run was logged" in text


def test_nothing_is_fetched_and_no_id_is_used_twice():
    html = page.render_report(full())
    parsed = Page(html)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object"}
    assert all(address.startswith("#") for address in parsed.addresses)
    assert {address[1:] for address in parsed.addresses} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", html))


def test_names_stay_text():
    results = full_of(HOSTILE)
    html = page.render_report(results)
    assert "script" not in Page(html).tags
    assert "<script" not in html
    assert HOSTILE in Page(html).text


@pytest.mark.parametrize("name", [HOSTILE, "模型 \x1b[31m\x00 $\\frac$", "", "x" * 300])
@pytest.mark.parametrize("figure", [plots.memory_bars, plots.step_time_bars])
def test_figures_draw_any_name_as_text(figure, name):
    results = full()
    results.compare[0].variant = name
    svg = figure(results)
    root = ElementTree.fromstring(svg)
    assert root.find(".//script") is None
    shown = plots.printable(name, 22)
    if shown:
        assert shown in [element.text for element in root.iter("text")]


def test_figures_follow_the_pages_colours_and_font():
    for svg in (plots.loss_curve(full()), plots.memory_bars(full()), plots.step_time_bars(full())):
        assert "currentColor" in svg
        assert "font-family" not in svg
        assert "<style" not in svg
        hard = re.findall(r"(?<!, )#[0-9a-f]{6}\b", svg)
        assert hard == []


def test_figures_are_the_same_every_time():
    assert page.render_report(full()) == page.render_report(full())


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    page.render_report(full())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("steps", [0, 1, 2, 29, 30, 5000])
def test_loss_curves_of_any_length(steps):
    results = full(steps)
    results.evaluations = []
    svg = plots.loss_curve(results)
    assert bool(svg) == (steps > 0)
    assert len(svg) < 60_000


def test_a_curve_with_gaps():
    results = full(60)
    for i in (0, 20, 21, 22, 23, 24, 59):
        results.history[i].loss = None
    assert "nan" not in plots.loss_curve(results)
    assert "7 logged steps without a finite loss" in Page(page.render_report(results)).text


def test_evaluations_without_any_training_loss():
    results = bare()
    results.evaluations = [Evaluation(step=0, loss=2.0), Evaluation(step=5, loss=math.nan)]
    assert "2.000" in plots.loss_curve(results)


def test_smoothing_does_not_lag():
    line = [float(i) for i in range(100)]
    assert plots._smooth(line) == pytest.approx(line)


def test_thinning_keeps_the_mean():
    points = [(i, float(i)) for i in range(1000)]
    steps, losses = plots._thinned(points)
    assert len(steps) <= 400
    assert steps == losses


def test_layers_are_grouped_by_their_numbers():
    groups = page.group_layers(
        {
            "layers.0.q": "a",
            "layers.1.q": "a",
            "layers.1.fc1": "a",
            "head": "a",
            "layers.2.q": "b",
            "0": "a",
        }
    )
    assert [(group.pattern, len(group.names)) for group in groups] == [
        ("layers.*.q", 2),
        ("layers.1.fc1", 1),
        ("head", 1),
        ("layers.2.q", 1),
        ("0", 1),
    ]


def test_a_slower_and_larger_variant_is_said_to_be():
    results = full()
    results.compare.reverse()
    found = {headline.label: headline.value for headline in page.headlines(results)}
    assert found["Memory of a step"].endswith("more")
    assert found["Step time"] == "1.26×"


def test_headlines_of_a_run_that_measured_its_loss_only():
    results = bare()
    results.history = [HistoryPoint(step=3, loss=1.25)]
    assert [(h.label, h.value) for h in page.headlines(results)] == [("Training loss", "1.250")]


def test_text_of_several_lines_in_a_recipe_stays_so():
    results = bare()
    results.run.recipe = {"template": "first\nsecond", "flag": None}
    assert page._recipe_yaml(results.run.recipe) == (
        "template: |-\n  first\n  second\nflag: null\n"
    )
