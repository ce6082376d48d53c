"""The keys of a recipe in docs/recipes.md, made from the sections that check them.

    python benchmarks/recipe_keys.py            # print them
    python benchmarks/recipe_keys.py --write    # put them between the marks of the page

What stands around them is written by hand.
"""

from __future__ import annotations

import argparse
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from marked import replaced
from velora_torch.atomic import write_whole
from velora_torch.bench.writing import markdown_grid
from velora_torch.training.schema import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
BEGIN = "<!-- keys: made by benchmarks/recipe_keys.py -->"
END = "<!-- end of keys -->"
SIMPLE = {int: "whole number", float: "number", str: "text", bool: "true, false"}


def keys() -> str:
    """A table of the recipe's own keys, and one of each section's."""
    tables = [_table("", Recipe)]
    tables += [_table(name, section) for name, section in _sections(Recipe)]
    return "\n\n".join(tables)


def with_keys(page: str) -> str:
    """The page with today's keys between its marks."""
    return replaced(page, BEGIN, keys(), END)


def _sections(model: type[BaseModel], prefix: str = "") -> list[tuple[str, type[BaseModel]]]:
    found = []
    for name, field in model.model_fields.items():
        if (section := _section(field.annotation)) is not None:
            path = f"{prefix}{name}"
            found += [(path, section), *_sections(section, f"{path}.")]
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) or (annotation,)
    kinds = (o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return next(kinds, None)


def _table(name: str, model: type[BaseModel]) -> str:
    body = [
        [f"`{key}`", _words(field.annotation), _default(field), _one_line(field.description)]
        for key, field in model.model_fields.items()
        if not name or _section(field.annotation) is None
    ]
    title = f"### `{name}`: {_one_line(model.__doc__)}" if name else "### The recipe itself"
    header = ["key", "value", "if not given", "what it is"]
    return f"{title}\n\n{markdown_grid(header, body, words=header)}"


def _words(annotation: Any) -> str:
    """What a key takes, in words."""
    if _section(annotation) is not None:
        return "a section"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(parts[0])
    if origin is Literal:
        return ", ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        words = dict.fromkeys(_words(p) for p in parts if p is not type(None))
        return ", or ".join([*words, *(["null"] if type(None) in parts else [])])
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return f"{_words(parts[1])} by name"
    return SIMPLE[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    if _section(field.annotation) is not None:
        return "null" if field.default is None else "its defaults"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", r"\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the page")
    if not parser.parse_args().write:
        print(keys())
        return
    write_whole(PAGE, with_keys(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
