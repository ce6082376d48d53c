import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from velora_torch.atomic import write_whole
from velora_torch.report.results import HistoryPoint, read_results, write_results

from .samples import bare, full


@pytest.mark.parametrize("make", [full, bare], ids=["full", "bare"])
def test_what_is_written_is_read_back(tmp_path, make):
    results = make()
    if make is bare:
        results.run.seconds = 1.0  # NaN is not equal to itself
    write_results(results, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == results


def test_numbers_that_are_not_finite_become_null(tmp_path):
    results = full(2)
    results.history[0].loss = math.nan
    results.history[1].loss = math.inf
    results.run.seconds = math.nan
    results.run.recipe["limit"] = -math.inf
    path = tmp_path / "results.json"
    write_results(results, path)

    document = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [point["loss"] for point in document["history"]] == [None, None]
    read = read_results(path)
    assert read.history[1].loss is None
    assert read.run.recipe["limit"] is None
    assert math.isnan(read.run.seconds)


def test_schema_is_named_first(tmp_path):
    write_results(bare(), tmp_path / "results.json")
    document = json.loads((tmp_path / "results.json").read_text())
    assert next(iter(document.items())) == ("schema", "velora-torch/results/1")


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "results.json"
    write_results(full(1), path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"results\.json: not a whole JSON file"):
            read_results(path)


def _set(*keys):
    *path, last, value = keys

    def change(document):
        for key in path:
            document = document[key]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("schema", "velora-torch/results/2"), "velora-torch/results/2"),
        (lambda document: document.pop("schema"), "not a results file"),
        (lambda document: document.pop("model"), "model: missing"),
        (lambda document: document["run"].pop("name"), "run.name: missing"),
        (_set("run", "status", "crashed"), "run.status: 'crashed' is none of 'finished'"),
        (_set("run", "colour", "red"), "run.colour: not a field"),
        (_set("model", "parameters", "many"), "model.parameters: expected int, found str 'many'"),
        (_set("model", "parameters", True), "model.parameters: expected int, found bool"),
        (_set("model", None), "model: expected an object, found null"),
        (_set("history", {}), "history: expected list, found dict"),
        (_set("history", 0, "loss", "low"), r"history\[0\].loss: expected float"),
        (_set("compare", 1, "seconds", "median", []), r"compare\[1\].seconds.median"),
        (_set("run", "versions", "torch", 2), "run.versions.torch: expected str"),
        (_set("notes", 0, 1), r"notes\[0\]: expected str, found int"),
    ],
)
def test_wrong_files_say_where_they_are_wrong(tmp_path, change, message):
    path = tmp_path / "results.json"
    write_results(full(1), path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        read_results(path)


@pytest.mark.parametrize("content", [b"[]", b"3", b'{"loss": 1}'], ids=["list", "number", "other"])
def test_other_json_is_refused(tmp_path, content):
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(ValueError, match="not a results file"):
        read_results(tmp_path / "other.json")


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "other.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a whole JSON file"):
        read_results(tmp_path / "other.json")


def test_what_json_cannot_hold_is_named(tmp_path):
    results = bare()
    results.run.recipe = {"data": {"files": [Path("a")]}}
    with pytest.raises(TypeError, match=r"results\.run\.recipe\.data\.files\[0\]"):
        write_results(results, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(bare(), path)
    old = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_results(full(), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_gets_the_usual_permissions(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_whole(tmp_path / "page.html", "text")
    assert os.stat(tmp_path / "page.html").st_mode == os.stat(tmp_path / "ordinary").st_mode


def test_memory_total_needs_every_category():
    memory = full().memory
    assert memory.total == sum(dataclasses.astuple(memory))
    memory.gradients = None
    assert memory.total is None


def test_defaults_make_a_point():
    assert HistoryPoint(step=1, loss=2.0).tokens_per_second is None
