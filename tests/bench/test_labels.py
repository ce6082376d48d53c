"""Where the names of a plot's points go."""

import pytest
from matplotlib.path import Path
from matplotlib.transforms import Bbox

from velora_torch.bench.labels import place_labels
from velora_torch.bench.plot import HEIGHT, WIDTH, Point, draw_point
from velora_torch.report.figures import single
from velora_torch.report.inline_svg import drawing

NINE = [(240 + 7 * (i % 4), 80 + 0.4 * (i % 5)) for i in range(9)]
"""Close together, as a table of VTAB may have."""
CLUSTER = [(240 + 5 * (i % 6), 80 + 0.6 * (i // 6) + 0.1 * (i % 2)) for i in range(18)]
"""Closer: not all names have room beside their points."""


@pytest.mark.parametrize("at", [NINE, CLUSTER], ids=["nine", "cluster"])
def test_names_and_their_lines_cover_neither_each_other_nor_a_point(at):
    points = [
        Point(f"v{i}", f"A method + VeLoRA {i}", *place, 0.1, None) for i, place in enumerate(at)
    ]
    with drawing():
        figure, axes = single(WIDTH, HEIGHT, "memory of a training step, MiB", "average score, %")
        for point in points:
            draw_point(axes, point)
        axes.margins(x=0.6, y=0.5)
        boxes = place_labels(figure, axes, points)
        ends = [[(p.memory, p.score + sign * p.error) for sign in (-1, 1)] for p in points]
        marks = [Bbox(axes.transData.transform(of)).padded(3) for of in ends]
    for i, box in enumerate(boxes):
        others = [*boxes[:i], *boxes[i + 1 :]]
        assert not any(box.overlaps(other) for other in [*others, *marks])
        assert Bbox.intersection(box, axes.bbox).bounds == pytest.approx(box.bounds)
    leaders = [i for i, text in enumerate(axes.texts) if text.arrow_patch is not None]
    assert bool(leaders) == (at is CLUSTER)
    for i in leaders:
        middle = ((boxes[i].x0 + boxes[i].x1) / 2, (boxes[i].y0 + boxes[i].y1) / 2)
        line = Path([middle, axes.transData.transform(at[i])])
        for j in range(len(points)):
            assert j == i or not line.intersects_bbox(boxes[j], filled=True)
            assert j == i or not line.intersects_bbox(marks[j], filled=True)


def test_names_keep_off_other_lines():
    """The first place, right of a point, is where a line begins; without it, it is taken."""
    points = [Point("a", "A method", 240, 80, 0.1, None), Point("b", "another", 260, 82, 0.1, None)]
    line = ((240.0, 80.0), (260.0, 80.0))
    beside = []
    for lines in ([], [line]):
        with drawing():
            figure, axes = single(WIDTH, HEIGHT, "MiB", "%")
            for point in points:
                draw_point(axes, point)
            axes.margins(x=0.6, y=0.5)
            box, _other = place_labels(figure, axes, points, lines)
            x, y = axes.transData.transform(line[0])
        beside.append(box.x0 > x and box.y0 < y < box.y1)
    assert beside == [True, False]
