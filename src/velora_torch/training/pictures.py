"""Images with a class each: packaged tasks, a folder of folders, or a hub data set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from velora_torch.paths import as_path
from velora_torch.remote_code import explain, trust
from velora_torch.training.assets import AssetError, resolve_model
from velora_torch.training.data import PreparedData, load_rows, split
from velora_torch.training.labelled import classes_of, label_of, part_of
from velora_torch.training.packaged.images import IMAGE_TASKS, check_images, load_images
from velora_torch.training.rows import Part
from velora_torch.training.schema import Recipe
from velora_torch.training.sections import DataSection
from velora_torch.training.sources import DataError, Rows, check_source, has_test_split

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pictures(Dataset[dict[str, Tensor]]):
    """Images (3, H, W) in uint8, so that a data set fits into memory, and their labels."""

    def __init__(self, images: Any, labels: Sequence[int]) -> None:
        self._images, self._labels = images, labels

    def select(self, places: Sequence[int]) -> Pictures:
        """The images at some places, in this order."""
        images, labels = self._images, self._labels
        return Pictures([images[place] for place in places], [labels[place] for place in places])

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One image and its label."""
        pixels = torch.from_numpy(self._images[index]).permute(2, 0, 1)
        return {"pixel_values": pixels, "labels": torch.tensor(self._labels[index])}


class Normalise:
    """Makes a batch: pixels between 0 and 1, less the mean, over the standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)
        self.dtype = dtype

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """pixel_values (B, 3, H, W) and labels (B)."""
        pixels = torch.stack([row["pixel_values"] for row in rows]).float() / 255
        normal = ((pixels - self.mean) / self.std).to(self.dtype)
        return {"pixel_values": normal, "labels": torch.stack([row["labels"] for row in rows])}


def check_pictures(name: str) -> None:
    """Raise `DataError` for data that are not there, without reading any."""
    if name in IMAGE_TASKS:
        try:
            check_images(name)
        except AssetError as error:
            raise DataError(f"{name}: {error}") from None
    elif not as_path(name).is_dir():
        check_source(name)


def prepare_pictures(recipe: Recipe) -> PreparedData:
    """Load, split, limit and resize images with labels."""
    size, mean, std = _form(recipe)
    if recipe.data.train in IMAGE_TASKS:
        classes, train, held = _packaged(recipe.data, size)
    else:
        classes, train, held = _read(recipe, size)
    stats = {
        "format": "images",
        "source": recipe.data.train,
        "train_examples": len(train),
        "eval_examples": len(held),
    }
    return PreparedData(
        "images",
        train,
        held if len(held) else None,
        Normalise(mean, std, getattr(torch, recipe.dtype)),
        classes=classes,
        stats=stats,
    )


def _packaged(data: DataSection, size: int) -> tuple[tuple[str, ...], Pictures, Pictures]:
    held_out = not has_test_split(data)
    wanted = data.max_train or 1000
    drawn = round(wanted / (1 - data.eval_fraction)) if held_out else wanted
    try:
        task = load_images(data.train, size, drawn, data.seed)
    except AssetError as error:
        raise DataError(f"{data.train}: {error}") from None
    train = Pictures(task.train_images, task.train_labels)
    held = Pictures(task.test_images, task.test_labels)
    if held_out:
        order = torch.randperm(drawn, generator=torch.Generator().manual_seed(data.seed)).tolist()
        train, held = train.select(order[:wanted]), train.select(order[wanted:])
    return task.classes, train, held.select(range(len(held))[: data.max_eval])


def _read(recipe: Recipe, size: int) -> tuple[tuple[str, ...], Pictures, Pictures]:
    data = recipe.data
    train_rows, held_rows = _folder_rows(data) if _is_folder(data.train) else load_rows(data)
    train = _shuffled(part_of(train_rows, recipe, data.train, "image"), data.seed)
    if held_rows:
        held = part_of(held_rows, recipe, data.eval or data.train, "image")
    else:
        train, held = split(train, data)
    classes = classes_of(train)
    return (
        classes,
        _pictures(train, classes, size, data.max_train),
        _pictures(held, classes, size, data.max_eval),
    )


def _shuffled(part: Part, seed: int) -> Part:
    order = list(range(len(part.rows)))
    random.Random(seed).shuffle(order)
    return part.select(order)


def _is_folder(name: str) -> bool:
    return as_path(name).is_dir()


def _folder_rows(data: DataSection) -> tuple[Rows, Rows]:
    """Rows of a folder with a folder for each class, within train/ and test/ or on their own."""
    root = as_path(data.train)
    held: Rows = []
    if (root / "train").is_dir():
        other = next((root / n for n in ("validation", "test") if (root / n).is_dir()), None)
        held = [] if other is None else _class_rows(other)
        root = root / "train"
    return _class_rows(root), held


def _class_rows(root: Path) -> Rows:
    rows = [
        {"image": str(path), "label": folder.name}
        for folder in sorted(p for p in root.iterdir() if p.is_dir())
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
    ]
    if not rows:
        raise DataError(f"{root}: no images; expected a folder of .png or .jpg for each class")
    return rows


def _pictures(part: Part, classes: tuple[str, ...], size: int, limit: int | None) -> Pictures:
    places = {name: i for i, name in enumerate(classes)}
    images: list[Any] = []
    labels: list[int] = []
    for where, row in part:
        if limit is not None and len(images) == limit:
            break
        images.append(_pixels(row.get(part.columns["image"]), size, where))
        labels.append(int(label_of(row.get(part.columns["label"]), places, where)))
    return Pictures(images, labels)


def _pixels(image: Any, size: int, where: str) -> Any:
    """An image of any kind that data sets hold, as (H, W, 3) in uint8."""
    import io

    import numpy as np
    from PIL import Image

    # What PIL raises for damaged files and for those that would fill the memory.
    unreadable = (OSError, TypeError, ValueError, OverflowError, SyntaxError)
    try:
        if isinstance(image, str):
            image = Image.open(image)
        elif isinstance(image, dict) and image.get("bytes"):
            image = Image.open(io.BytesIO(image["bytes"]))
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image, dtype=np.uint8))
        return np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    except (*unreadable, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not an image that can be read: {error}") from None


def _form(recipe: Recipe) -> tuple[int, Sequence[float], Sequence[float]]:
    """Size, mean and standard deviation of what the model was trained on."""
    from transformers import AutoConfig
    from transformers.image_processing_base import ImageProcessingMixin

    source = resolve_model(recipe.model)
    try:
        config = AutoConfig.from_pretrained(source, **trust())
    except (OSError, ValueError) as error:
        raise DataError(
            f"no configuration for {recipe.model!r}: {explain(recipe.model, error)}"
        ) from None
    timm = getattr(config, "pretrained_cfg", None)
    if timm:
        size = recipe.data.image_size or timm["input_size"][-1]
        return size, timm["mean"], timm["std"]
    try:
        form = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:  # a model without a preprocessor
        form = {}
    asked = form.get("crop_size") or form.get("size") or {}
    size = recipe.data.image_size or asked.get("height") or getattr(config, "image_size", None)
    if not isinstance(size, int):
        raise DataError(f"{recipe.model!r} does not say which images it takes; set data.image_size")
    return size, form.get("image_mean", IMAGENET_MEAN), form.get("image_std", IMAGENET_STD)
