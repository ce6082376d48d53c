"""Lines are whole or absent."""

from __future__ import annotations

import os

import pytest

from velora_torch.bench.store import append_line, read_lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "rows.jsonl"


def test_lines_come_back_in_order(path):
    for number in range(3):
        append_line(path, {"number": number, "text": "ä\nb"})
    assert [line["number"] for line in read_lines(path)] == [0, 1, 2]
    assert path.read_bytes().count(b"\n") == 3


def test_no_file_no_lines(path):
    assert list(read_lines(path)) == []


@pytest.mark.parametrize("torn", [b'{"number": 1', b'{"number": 1}', b"x" * 9000], ids=len)
def test_what_a_crash_left_is_absent(path, torn):
    append_line(path, {"number": 0})
    path.write_bytes(path.read_bytes() + torn)
    assert [line["number"] for line in read_lines(path)] == [0]
    append_line(path, {"number": 2})
    assert [line["number"] for line in read_lines(path)] == [0, 2]
    assert torn not in path.read_bytes()


def test_a_full_disk_leaves_the_file_as_it_was(path, monkeypatch):
    append_line(path, {"number": 0})
    before, real, calls = path.read_bytes(), os.write, []

    def write(file, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(file, data[:5])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space"):
        append_line(path, {"number": 1})
    assert len(calls) == 2
    assert path.read_bytes() == before


def test_every_line_is_on_the_disk_before_the_call_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    append_line(path, {"number": 0})
    assert synced == [path.stat().st_size]


def test_numbers_that_json_lacks_are_refused_and_write_nothing(path):
    append_line(path, {"number": 0})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        append_line(path, {"number": float("nan")})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken}\n", "rows.jsonl:2: not valid JSON"),
        (b"[1]\n", "rows.jsonl:2: expected a JSON object"),
    ],
    ids=["broken", "list"],
)
def test_a_whole_line_that_is_wrong_is_named(path, line, message):
    append_line(path, {"number": 0})
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=message):
        list(read_lines(path))
