"""Small image tasks after the protocol of VTAB-1k: 1000 training examples, a fixed test set.

The pictures come from Python packages, or are rendered here (`rendered.py`). Shapes are
(N, H, W, 3) in uint8.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from velora_torch.training.assets import AssetError
from velora_torch.training.packaged import pixels
from velora_torch.training.packaged.rendered import RENDERERS, render

if TYPE_CHECKING:
    import numpy as np

IMAGE_TASKS: tuple[str, ...] = (
    "digits",
    "mnist-5k",
    "animals",
    "emoji",
    "count",
    "position",
    "orientation",
)
"""Four real tasks, then three rendered ones.

digits: handwritten digits of 8 × 8 pixels (UCI); mnist-5k: 500 of each digit of MNIST; animals:
silhouettes of ten animals; emoji: pictures of emoji by their group in Unicode; count, position,
orientation: how many things, where, and at which angle, in small rendered scenes.
"""
TEST_EXAMPLES = 500
"""Test examples of a task, at most."""
_FEWEST_TEST_EXAMPLES = 100

_READERS: dict[str, tuple[Callable[[], pixels.Labelled], Callable[[], None]]] = {
    "digits": (pixels.read_digits, pixels.check_digits),
    "mnist-5k": (pixels.read_mnist, pixels.check_mnist),
    "animals": (pixels.read_animals, pixels.check_animals),
    "emoji": (pixels.read_emoji, pixels.check_emoji),
}


@dataclass(frozen=True)
class ImageTask:
    """Images with a class each, split into training and test examples.

    Images are (N, H, W, 3) in uint8, labels are places in `classes`.
    """

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: list[int]
    test_images: np.ndarray
    test_labels: list[int]


def load_images(name: str, size: int = 112, examples: int = 1000, seed: int = 0) -> ImageTask:
    """Draw `examples` training images and up to 500 test images of `size` × `size` pixels.

    Both draws keep the shares of the classes. `seed` draws the training examples alone: the test
    examples are the same for every seed, and never among the training examples.

    Raises:
        AssetError: unknown task, or its package is not installed.
        ValueError: the task has fewer than `examples` + 100 examples.
    """
    check_images(name)
    if name in RENDERERS:
        return _rendered(name, size, examples, seed)
    classes, images, labels = _READERS[name][0]()
    keep = _first_of_equals(images)
    if len(keep) < examples + _FEWEST_TEST_EXAMPLES:
        raise ValueError(
            f"{name} has {len(keep)} different images: too few for {examples} training and "
            f"{_FEWEST_TEST_EXAMPLES} test examples; ask for at most "
            f"{max(0, len(keep) - _FEWEST_TEST_EXAMPLES)} training examples"
        )
    held = min(TEST_EXAMPLES, len(keep) - examples)
    test = _stratified(keep, labels, held, seed=0)
    drawn = set(test)
    train = _stratified([i for i in keep if i not in drawn], labels, examples, seed)
    return ImageTask(
        name,
        classes,
        pixels.resize([images[i] for i in train], size),
        [labels[i] for i in train],
        pixels.resize([images[i] for i in test], size),
        [labels[i] for i in test],
    )


def check_images(name: str) -> None:
    """Raise `AssetError` for an unknown task, or if a package that it needs is not installed."""
    if name not in IMAGE_TASKS:
        near = difflib.get_close_matches(name, IMAGE_TASKS, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(IMAGE_TASKS)}"
        raise AssetError(f"no packaged image task {name!r}; {hint}")
    if name in _READERS:
        _READERS[name][1]()


def _rendered(name: str, size: int, examples: int, seed: int) -> ImageTask:
    classes = RENDERERS[name].classes
    train_images, train_labels = render(name, size, examples, ("train", seed))
    test_images, test_labels = render(name, size, TEST_EXAMPLES, ("test",))
    return ImageTask(name, classes, train_images, train_labels, test_images, test_labels)


def _first_of_equals(images: Sequence[np.ndarray]) -> list[int]:
    """Positions of the images without those that repeat an earlier one pixel by pixel."""
    first: dict[bytes, int] = {}
    for i, image in enumerate(images):
        first.setdefault(image.tobytes(), i)
    return list(first.values())


def _stratified(pool: Sequence[int], labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Draw `count` of the positions in `pool`, each class with its share, in random order."""
    chance = random.Random(seed)
    members: dict[int, list[int]] = {}
    for i in pool:
        members.setdefault(labels[i], []).append(i)
    # Largest remainder: whole examples first, then one more where the most was cut off.
    shares = {label: count * len(own) / len(pool) for label, own in sorted(members.items())}
    counts = {label: int(share) for label, share in shares.items()}
    rest = sorted(shares, key=lambda label: counts[label] - shares[label])
    for label in rest[: count - sum(counts.values())]:
        counts[label] += 1
    drawn = [i for label in counts for i in chance.sample(members[label], counts[label])]
    chance.shuffle(drawn)
    return drawn
