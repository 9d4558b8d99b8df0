"""Steps from small data: every clip once an epoch on any number of ranks and workers, from any step on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from stdit.data.config import DataConfig, PlanConfig
from stdit.data.decode.write import write_video
from stdit.data.load.loader import Loader
from stdit.data.manifest import Caption, Clip, Manifest, clip_id
from stdit.data.plan.buckets import assign
from stdit.data.plan.planner import Plan
from stdit.errors import StditError
from stdit.training.batches import StepLoader


def clips(folder, sizes):
    rows = []
    for number, (width, height) in enumerate(sizes):
        write_video(folder / f"{number}.mp4", np.full((6, height, width, 3), 30 * number, np.uint8), 8)
        sha256 = f"{number:064x}"
        path, captions = str(folder / f"{number}.mp4"), (Caption(str(number)),)
        rows.append(Clip(clip_id(sha256, 0, 0.75), path, captions, 6, 8.0, width, height, 0.0, 0.75, sha256))
    return Manifest.of(rows, folder)


def steps(manifest, count, ranks=1, first=0, workers=0, shapes=("16x16x5", "32x16x5"), clips_per_step=8.0):
    """[(epoch, index, clips, [micro-step: examples of all ranks])] of `count` steps."""
    config = DataConfig(shapes=list(shapes), fps=8.0, prefetch=2)
    assignment = assign(manifest, config)
    plan = PlanConfig(largest_clips_per_step=clips_per_step)
    plan_of = cache(lambda epoch: Plan(assignment.bucket, [2, 4], (1, 1), plan, 5, epoch))
    found = []
    feeds = [
        StepLoader(plan_of, Loader(manifest, assignment, config, 5, workers=workers), rank, ranks, first)
        for rank in range(ranks)
    ]
    for _ in range(count):
        parts = [next(feed.steps) for feed in feeds]
        assert (
            len({(p.epoch, p.index, p.num_clips, len(p.micro_steps)) for p in parts}) == 1
        )  # micro-steps too: no rank waits
        examples = [
            [e for p in parts for e in p.micro_steps[micro].examples] for micro in range(len(parts[0].micro_steps))
        ]
        found.append((parts[0].epoch, parts[0].index, parts[0].num_clips, examples))
    for feed in feeds:
        feed.close()
    return found


def test_steps_not_asked_for_hold_the_readers_back(tmp_path):
    manifest = clips(tmp_path, [(16, 16)] * 3)
    config = DataConfig(shapes=["16x16x5"], fps=8.0, prefetch=2)
    assignment, reads = assign(manifest, config), []

    def reader(path, count, size, *arguments):
        reads.append(path)
        return np.zeros((count, size[1], size[0], 3), np.uint8)

    plan_of = cache(lambda epoch: Plan(assignment.bucket, [2], (1, 1), PlanConfig(largest_clips_per_step=1), 5, epoch))
    feed = StepLoader(plan_of, Loader(manifest, assignment, config, 5, workers=1, reader=reader), 0, 1, 0)
    for taken in (1, 2, 3):
        next(feed.steps)
        before = -1
        while before != len(reads):  # until nothing more is read
            before = len(reads)
            time.sleep(0.1)
        assert taken < len(reads) <= taken + 2 + 1 + config.prefetch  # ready, about to be, and being read
    feed.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("stdit-feed", "stdit-loader"))]
    assert not left  # in torch's code as the process ends, one would abort it


def test_epochs_of_other_lengths_are_counted(tmp_path):
    """Weights of half a time make epochs differ; a feed finds its place in any of them."""
    manifest = clips(tmp_path, [(16, 16)] * 5)
    config = DataConfig(shapes=["16x16x5"], fps=8.0)
    assignment = assign(manifest, config)
    settings = PlanConfig(largest_clips_per_step=1)
    plan_of = cache(lambda epoch: Plan(assignment.bucket, [2], (1, 1), settings, 5, epoch, weights=np.full(5, 0.5)))
    lengths = [plan_of(epoch).num_steps for epoch in range(4)]
    assert len(set(lengths)) > 1 and sum(lengths) == 10
    wanted = [(epoch, index) for epoch, length in enumerate(lengths) for index in range(length)]
    for first in range(10):
        feed = StepLoader(plan_of, Loader(manifest, assignment, config, 5, workers=0), 0, 1, first)
        found = [next(feed.steps) for _ in range(10 - first)]
        assert [(step.epoch, step.index) for step in found] == wanted[first:]
        if first == 0:
            rows = Counter(item.row for step in found for micro in step.micro_steps for item in micro.items)
            assert rows == {row: 2 for row in range(5)}


def rows(step):
    return Counter((e.row, e.occurrence) for micro in step[3] for e in micro)


@pytest.mark.parametrize(
    "sizes",
    [[(16, 16)], [(16, 16)] * 3, [(16, 16), (16, 16), (32, 16), (16, 16)]],
    ids=["one clip", "less than a step", "a bucket with one clip"],
)
@pytest.mark.parametrize("ranks", [1, 4])
def test_small_data_trains_and_loses_nothing(tmp_path, sizes, ranks):
    manifest = clips(tmp_path, sizes)
    for epoch, step in enumerate(steps(manifest, 3, ranks)):
        assert step[:3] == (epoch, 0, len(sizes))
        assert rows(step) == Counter((row, 0) for row in range(len(sizes)))
        assert all(e.weight == 1 for micro in step[3] for e in micro)


def test_no_clip_says_what_to_change(tmp_path):
    for manifest in (Manifest.of([]), clips(tmp_path, [(16, 16)])):
        with pytest.raises(StditError, match=r"no clip is in any bucket.*data\.shapes"):
            steps(manifest, 1, shapes=("64x64x5", "64x64x9"))


def test_a_feed_goes_on_from_any_step_with_any_number_of_workers(tmp_path):
    manifest = clips(tmp_path, [(16, 16), (16, 16), (32, 16), (16, 16), (32, 16)])
    whole = steps(manifest, 6, clips_per_step=1.2)
    assert whole[-1][0] >= 1  # past the end of an epoch
    for first, workers, ranks in [(1, 0, 1), (4, 2, 1), (2, 1, 2)]:
        for step, wanted in zip(steps(manifest, 6 - first, ranks, first, workers, clips_per_step=1.2), whole[first:]):
            assert step[:3] == wanted[:3] and rows(step) == rows(wanted)
            frames = {e.row: e.frames for micro in wanted[3] for e in micro}
            assert all(torch.equal(e.frames, frames[e.row]) for micro in step[3] for e in micro)
