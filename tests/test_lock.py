"""One process at a time works in a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from velora_torch import lock

HOLD = """
import runpy, sys, time
from pathlib import Path
alone = runpy.run_path(sys.argv[2])["alone"]  # without the rest of the package, which takes long
with alone(Path(sys.argv[1]), "velora train", "train.output=..."):
    print("held", flush=True)
    time.sleep(600)
"""


def alone(folder):
    return lock.alone(folder, "velora bench", "--output")


def test_two_do_not_write_into_one_folder(tmp_path):
    with alone(tmp_path / "out"):
        with (
            pytest.raises(ValueError, match=r"another `velora bench` \(process \d+\) is writing"),
            alone(tmp_path / "out"),
        ):
            pass
        with alone(tmp_path / "other"):
            pass
        with pytest.raises(ValueError, match="choose another folder with --output"):
            alone(tmp_path / "out").__enter__()
    with alone(tmp_path / "out"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(out), lock.__file__]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"process {holder.pid}\)"):
        alone(out).__enter__()
    holder.kill()
    holder.communicate()
    assert (out / lock.NAME).exists()  # the file of a dead process holds nobody up
    with alone(out):
        pass


def test_nothing_of_the_lock_stays(tmp_path):
    with pytest.raises(KeyError), alone(tmp_path / "deep" / "out"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    kept = tmp_path / "kept"
    with alone(kept):
        (kept / "file").touch()
    assert [path.name for path in kept.iterdir()] == ["file"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with alone(empty):
        pass
    assert empty.is_dir()  # it was there before
