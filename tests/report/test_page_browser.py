"""The page in a browser: names that are code do not run there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from velora_torch.report import page

from .samples import full_of

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (on Debian: apt-get install chromium)"
)
MARK = "it-ran"
RUN = f"document.documentElement.setAttribute('data-{MARK}', '1')"
CODE = [
    f"<script>{RUN}</script>",
    f"</pre></svg></style></title><script>{RUN}</script>",
    f'<img src=x onerror="{RUN}">',
    f'"\'><svg onload="{RUN}">',
    f'{{{{ 7 * 191 }}}}<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
]


def dom(folder: Path, html: str) -> str:
    """The document after its scripts have run, as HTML."""
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


def test_code_in_names_does_not_run(tmp_path: Path) -> None:
    name = " ".join(CODE)
    shown = dom(tmp_path, page.render_report(full_of(name)))
    assert "Machine and versions" in shown  # the page is whole
    assert f"data-{MARK}=" not in shown
    assert "1337" not in shown
    for tag in ("<script", "<img", "<iframe"):
        assert tag not in shown


def test_the_same_code_would_run(tmp_path: Path) -> None:
    for place, code in enumerate(CODE):
        folder = tmp_path / str(place)
        folder.mkdir()
        assert f'data-{MARK}="1"' in dom(folder, f"<!doctype html><body>{code}</body>"), code
