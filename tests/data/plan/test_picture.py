from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from stdit.data.config import PlanConfig
from stdit.data.plan.picture import _draw_balance, draw_plan, measure_plan, readable_work
from stdit.data.plan.planner import Plan
from stdit.data.plan.split import balance, split
from stdit.shapes import VideoShape

SHAPES = [VideoShape.parse(text) for text in ("64x64", "64x64x9", "96x64x9", "64x96x9", "64x64x17")]


def make(bucket, shapes=SHAPES, **config) -> Plan:
    tokens = [shape.grid((4, 4, 4), (1, 2, 2)).tokens for shape in shapes]
    return Plan(np.asarray(bucket), tokens, (4_000_000, 4_000), PlanConfig(**config), 0, names=shapes)


def test_measures_are_those_of_the_steps():
    plan = make(np.random.RandomState(0).randint(0, 5, 300), tokens_per_pack=800)
    bound = plan.token_bound()
    measures = measure_plan(plan, 3, bound, most=0)
    assert measures.steps == list(range(plan.num_steps))
    assert sum(measures.clips) == 300 and sum(measures.work) == plan.total_work
    splits = [split(plan.items(i), 3, bound) for i in measures.steps]
    assert measures.balance == pytest.approx([balance(packs) for packs in splits])
    assert measures.total_balance == pytest.approx(balance(*splits))
    assert measures.micro_steps == [len(packs) for packs in splits]
    assert max(measures.fullest) <= bound and measures.total_balance <= measures.best_balance <= 1


def test_some_steps_are_spread_over_the_epoch():
    plan = make([1] * 400)
    assert plan.num_steps == 25
    assert measure_plan(plan, 2, 16384, most=5).steps == [0, 5, 10, 15, 20]


def test_best_balance_is_of_a_clip_that_cannot_be_divided():
    plan = make([4, 1], largest_clips_per_step=100)
    measures = measure_plan(plan, 4, 16384)
    assert measures.best_balance == pytest.approx(plan.total_work / 4 / plan.work[4])
    assert measures.total_balance == pytest.approx(measures.best_balance)


@pytest.mark.parametrize(
    ("bucket", "shapes", "groups"),
    [
        ([0], SHAPES[:1], 1),
        (np.random.RandomState(0).randint(0, 5, 200), SHAPES, 12),
        (np.arange(64) % 32, [VideoShape(1 + 4 * (i % 4), 16, 16 * (i // 4 + 1)) for i in range(32)], 2),
    ],
)
def test_the_picture_shows_every_part(bucket, shapes, groups, tmp_path):
    shapes = [VideoShape(s.frames, s.height, s.width) for s in shapes]
    plan = make(bucket, shapes)
    path = tmp_path / "new" / "plan.png"
    draw_plan(plan, shapes, groups, 16384, path, measure_plan(plan, groups, 16384))
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert height > 1000 and width > 1400
    coloured = (pixels.max(2) - pixels.min(2)) > 60  # shapes, packs and curves; text, axes and idle are grey
    for part in (slice(0, height // 3), slice(height // 3, 7 * height // 10), slice(3 * height // 4, height)):
        assert coloured[part].sum() > 100
    edge = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
    assert (edge == 255).all()  # nothing is cut off


def test_readable_work():
    assert readable_work(12_870_856_212_480_000) == "12.9 PFLOP"
    assert readable_work(82_944, "pixel") == "82.9 kpixel"
    assert readable_work(5) == "5 FLOP"


@pytest.mark.parametrize("clips", [1, 32, 48, 400])
def test_steps_are_counted_in_whole_numbers(clips):
    plan = make([1] * clips)
    axes = Figure().subplots()
    _draw_balance(axes, measure_plan(plan, 1, 16384), 16384, plan.num_steps)
    ticks = axes.get_xticks()
    assert np.array_equal(ticks, np.round(ticks)) and 0 in ticks
