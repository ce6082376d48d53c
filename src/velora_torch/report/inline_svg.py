"""A matplotlib figure as an SVG element that lives inside an HTML page.

What matplotlib writes is a document of its own: fixed colours, fixed size, a font list, a style
rule for every element on the page, and ids that clash with those of the next figure. Here the
colours become CSS variables (so that a dark page is readable), text takes the page's font, the
figure scales with its column, and ids carry the figure's name.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours to draw with -> what stands in the page. The values fall back to the colour itself.
INK = "#1b1f24"
QUIET = "#59636e"
LINE = "#d1d9e0"
GREY = "#8a929b"
BLUE = "#0072b2"
ORANGE = "#d55e00"
YELLOW = "#e69f00"
GREEN = "#009e73"
PURPLE = "#cc79a7"
_CSS = {
    INK: "currentColor",
    QUIET: f"var(--quiet, {QUIET})",
    LINE: f"var(--line, {LINE})",
    GREY: f"var(--grey, {GREY})",
    BLUE: f"var(--blue, {BLUE})",
    ORANGE: f"var(--orange, {ORANGE})",
    YELLOW: f"var(--yellow, {YELLOW})",
    GREEN: f"var(--green, {GREEN})",
    PURPLE: f"var(--purple, {PURPLE})",
}
_SETTINGS: Mapping[str, object] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and selected
    "svg.hashsalt": "velora-torch",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


@contextmanager
def drawing() -> Iterator[None]:
    """The settings to build and render a figure with; matplotlib's own come back afterwards."""
    import matplotlib

    with matplotlib.rc_context(dict(_SETTINGS)), warnings.catch_warnings():
        # The page's font draws the text, so what matplotlib's font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", module="matplotlib")
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def printable(text: str, length: int = 40) -> str:
    """A name as one short line of characters that XML allows."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """`figure` as an `<svg>` element; `description` is what a screen reader says for it."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style") or child.tag.endswith("}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: _page_value(key.rpartition("}")[2], value, name)
            for key, value in element.attrib.items()
        }
        # Indentation between elements says nothing, and <text> has no child elements.
        if element.tag != "text" and element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib |= {
        "role": "img",
        "aria-label": printable(description, 400),
        "style": "stroke-linejoin: round; stroke-linecap: butt",
    }
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _page_value(key: str, value: str, name: str) -> str:
    """An attribute's value as the page needs it."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r"font-family: [^;]*;?\s*", "", value)
        return re.sub(r"#[0-9a-f]{6}", lambda match: _CSS.get(match[0], match[0]), value)
    if key == "d":
        return " ".join(value.split())
    return value
