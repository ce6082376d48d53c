"""Read a recipe: YAML and `key=value` overrides in, a validated `Recipe` or a `RecipeError` out.

An error names the file and line (or the override), the dotted key, what was found, what was
expected, and for an unknown key the nearest known one. All problems are reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from velora_torch.training.schema import Recipe
from velora_torch.training.sections import (
    ColumnsSection,
    CompareSection,
    DataSection,
    EvaluateSection,
    HydraSection,
    LoraSection,
    QuantizationSection,
    TokenizerSection,
    TrainSection,
    VeloraSection,
)
from velora_torch.training.yaml_limits import check_limits

__all__ = [
    "ColumnsSection",
    "CompareSection",
    "DataSection",
    "EvaluateSection",
    "HydraSection",
    "LoraSection",
    "QuantizationSection",
    "Recipe",
    "RecipeError",
    "TokenizerSection",
    "TrainSection",
    "VeloraSection",
    "load_recipe",
    "recipe_to_yaml",
]

# Names that other trainers use for our keys.
SYNONYMS = {
    "lr": "train.learning_rate",
    "max_steps": "train.steps",
    "max_tokens": "train.tokens",
    "vocab_size": "tokenizer.vocab_size",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
    "output_dir": "train.output",
    "save_total_limit": "train.keep",
    "dataset": "data.train",
    "rank": "lora.r",
    "groups": "velora.num_groups",
}
# An override of one of these takes the place of the file's other one.
EXCLUSIVE = (
    ("train.steps", "train.epochs", "train.tokens"),
    ("velora.num_groups", "velora.sub_token_size"),
    ("tokenizer.vocab_size", "tokenizer.source"),
)

LARGEST_INT_BITS = 1000
MOST_BYTES = 2**20
"""Of a recipe: its reader takes a second for some 100 kB."""

KeyPath = tuple[str | int, ...]
UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError)
"""What PyYAML raises for values that it cannot make, besides its own errors."""


class RecipeError(ValueError):
    """A recipe can't be used; the message has a line for each problem."""


class _Loader(yaml.SafeLoader):
    """The safe loader, which takes 1e-4 for a number (YAML 1.2) and not for a text (YAML 1.1)."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number that a float can hold too, and that can be shown."""
        number: int = super().construct_yaml_int(node)
        if number.bit_length() > LARGEST_INT_BITS:
            raise yaml.constructor.ConstructorError(
                problem="the number is too large", problem_mark=node.start_mark
            )
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@dataclass
class _Source:
    """Where each value came from, to say so in errors."""

    file: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, key: KeyPath) -> str:
        """Return "FILE:LINE" or "override `KEY=VALUE`" for a key or its nearest parent."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.overrides:
                return f"override `{self.overrides[key[:length]]}`"
            if key[:length] in self.lines:
                return f"{self.file}:{self.lines[key[:length]]}"
        for below, text in self.overrides.items():
            if below[: len(key)] == key:
                return f"override `{text}`"
        return f"{self.file}:1"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a YAML file and apply overrides such as `train.steps=20`.

    An override's value is YAML. Overriding `train.steps` drops the file's `train.epochs` and
    `train.tokens`; the same holds for all settings of which one can be given (`EXCLUSIVE`).
    """
    path = Path(path)
    source = _Source(str(path))
    data = _parse(_read(path), source)
    for text in overrides:
        _override(data, text, source)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(_problems(error, data, source))) from None
    if "output" not in recipe.train.model_fields_set:
        recipe.train.output = f"runs/{path.stem}"
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe with all its defaults; `load_recipe` reads the same recipe back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True, width=100)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:  # which may have no end, such as /dev/zero
            raw = file.read(MOST_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; expected a YAML file") from None
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1, 0.5)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise RecipeError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MOST_BYTES:
        raise RecipeError(
            f"{path}: is too large for a recipe, which has at most {MOST_BYTES:,} bytes"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 text") from None


def _parse(text: str, source: _Source) -> dict[str, Any]:
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{source.file}:1: the recipe is empty; it needs at least data.train")
        if not isinstance(node, yaml.MappingNode):
            line = node.start_mark.line + 1
            raise RecipeError(f"{source.file}:{line}: expected `key: value` lines at the top level")
        check_limits(node)
        _record_lines(node, (), source, loader)
        data: dict[str, Any] = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = error.problem or error.context or "not valid YAML"
        if "'\\t'" in what:
            what = "a tab character: YAML is indented with spaces"
        raise RecipeError(f"{source.file}:{line}: not valid YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{source.file}:{line}: not valid YAML: {error.reason}") from None
    except RecipeError:
        raise
    except UNREADABLE as error:
        raise RecipeError(f"{source.file}:1: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    return data


def _record_lines(node: yaml.Node, key: KeyPath, source: _Source, loader: _Loader) -> None:
    """Note the line of every key; keys must be texts, and none may come twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            source.lines[(*key, index)] = item.start_mark.line + 1
        return
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{source.file}:{line}: a key must be a plain word")
        name = str(key_node.value)
        below = (*key, name)
        dotted = _dotted(below)
        if name in first:
            raise RecipeError(
                f"{source.file}:{line}: `{dotted}` is set twice (first on line {first[name]})"
            )
        if not key_node.tag.endswith((":str", ":merge")):
            raise RecipeError(f"{source.file}:{line}: the key `{name}` must be a word; quote it")
        first[name] = line
        source.lines[below] = line
        if value_node.start_mark.line >= key_node.start_mark.line:  # an alias points backwards
            _record_lines(value_node, below, source, loader)


def _value(text: str) -> Any:
    """The value that a text of YAML stands for."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        check_limits(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _override(data: dict[str, Any], text: str, source: _Source) -> None:
    dotted, equals, raw = text.partition("=")
    names = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(names):
        raise RecipeError(f"override `{text}`: expected key=value, such as train.steps=20")
    try:
        value = _value(raw)
    except (yaml.YAMLError, *UNREADABLE) as error:
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise RecipeError(
            f"override `{text}`: the value is not valid YAML ({what}); "
            f"a text with special characters needs quotes of its own: {dotted}='\"…\"'"
        ) from None
    section = data
    for depth, name in enumerate(names[:-1]):
        below = section.get(name)
        if below is None:
            below = section[name] = {}
        if not isinstance(below, dict):
            raise RecipeError(
                f"override `{text}`: `{_dotted(names[: depth + 1])}` is not a section"
            )
        section = below
    section[names[-1]] = value
    source.overrides[names] = text
    for group in EXCLUSIVE:
        if _dotted(names) in group and value is not None:
            for name in group:
                other = name.rpartition(".")[2]
                if (*names[:-1], other) not in source.overrides:
                    section.pop(other, None)


def _problems(error: ValidationError, data: dict[str, Any], source: _Source) -> Iterator[str]:
    """One line per faulty key; what the branches of a union say about one key is joined."""
    by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_key.setdefault(_key(details, data), []).append(details)
    for key, found in by_key.items():
        if any(len(other) > len(key) and other[: len(key)] == key for other in by_key):
            continue  # the other branch of a union says it more precisely
        yield f"{source.where(key)}: `{_dotted(key)}` {_explain(key, found)}"


def _key(details: ErrorDetails, data: Any) -> KeyPath:
    """Map pydantic's location, which has union branches in it, to the recipe's own key."""
    if details["type"] == "recipe":
        return tuple(str(details["ctx"]["key"]).split("."))
    if details["type"] == "missing":
        return tuple(details["loc"])
    key: list[str | int] = []
    value = data
    for part in details["loc"]:
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_index or (isinstance(value, dict) and part in value):
            key.append(part)
            value = value[part]
    return tuple(key)


def _explain(key: KeyPath, found: list[ErrorDetails]) -> str:
    details = found[0]
    kind = details["type"]
    if kind == "extra_forbidden":
        near = _nearest_key(key)
        return "is not a known key" + (f"; did you mean `{near}`?" if near else "")
    meaning = _meaning(key)
    if kind == "missing":
        return f"is missing: {meaning[:1].lower()}{meaning[1:]}"
    if kind == "recipe":
        return details["msg"]
    if kind == "value_error":
        return f"= {details['input']!r} {details['msg'].removeprefix('Value error, ')}"
    wanted = dict.fromkeys(_wanted(d) for d in found)
    text = f"is {_show(details['input'])}; expected {' or '.join(wanted)}"
    if kind == "literal_error" and isinstance(details["input"], str):
        choices = re.findall(r"'([^']+)'", details["ctx"]["expected"])
        near_value = difflib.get_close_matches(details["input"], choices, 1)
        text += f"; did you mean {near_value[0]!r}?" if near_value else ""
    return f"{text} ({meaning})" if meaning else text


def _wanted(details: ErrorDetails) -> str:
    if details["type"] in ("model_type", "dict_type"):
        return "a section of `key: value` lines"
    message = details["msg"]
    for old, new in (
        ("Input should be ", ""),
        ("a valid ", "a "),
        ("a integer", "an integer"),
        ("greater than", "a number greater than"),
        ("less than", "a number less than"),
    ):
        message = message.replace(old, new)
    return message[0].lower() + message[1:]


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(key: KeyPath) -> str:
    return ".".join(str(part) for part in key)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for arg in get_args(annotation) if (s := _section_of(arg))), None)


def _known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        if (section := _section_of(info.annotation)) is not None:
            yield from _known_keys(section, f"{prefix}{name}.")


def _nearest_key(key: KeyPath) -> str | None:
    """Find a key of the same section, else the same or a similar name anywhere."""
    name, parent = str(key[-1]), _dotted(key[:-1])
    known = list(_known_keys())
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    leaves = [k.rpartition(".")[2] for k in siblings]
    if near := difflib.get_close_matches(name, leaves, 1, 0.7):
        return siblings[leaves.index(near[0])]
    if name in SYNONYMS:
        return SYNONYMS[name]
    everywhere = [k.rpartition(".")[2] for k in known]
    if near := difflib.get_close_matches(name, everywhere, 1, 0.75):
        return known[everywhere.index(near[0])]
    if near := difflib.get_close_matches(name, leaves, 1, 0.5):
        return siblings[leaves.index(near[0])]
    return None


def _meaning(key: KeyPath) -> str:
    """Return what the schema's docstring says about a key."""
    model: type[BaseModel] | None = Recipe
    meaning = ""
    for part in key:
        if model is None or part not in model.model_fields:
            break
        info = model.model_fields[str(part)]
        meaning = " ".join((info.description or "").split()).rstrip(".")
        model = _section_of(info.annotation)
    return meaning
