import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def test_the_figure_of_the_method_is_drawn_the_same_every_time(tmp_path):
    files = [tmp_path / "first.svg", tmp_path / "second.svg"]
    for file in files:
        subprocess.run([sys.executable, FIGURES / "method.py", file], check=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"<dc:date>" not in files[0].read_bytes()


def test_the_committed_figure_is_the_one_that_method_md_shows():
    assert ElementTree.parse(FIGURES / "method.svg").getroot().tag.endswith("svg")
    assert "(figures/method.svg)" in (FIGURES.parent / "method.md").read_text(encoding="utf-8")
