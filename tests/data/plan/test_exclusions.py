"""What is said of clips that no shape takes is true: the remedy, applied, takes as many as it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stdit.data.config import DataConfig
from stdit.data.manifest import Caption, Clip, Manifest, clip_id
from stdit.data.plan.buckets import Reason, assign, explain_exclusions
from stdit.errors import StditError
from stdit.shapes import VideoShape


def manifest(kinds):
    """kinds: (frames, fps, width, height) of each clip."""
    clips = []
    for number, (frames, fps, width, height) in enumerate(kinds):
        sha, end = f"{number:064x}", 0.0 if frames == 1 else frames / fps
        clips.append(Clip(clip_id(sha, 0, end), "a", (Caption("a"),), frames, float(fps), width, height, 0.0, end, sha))
    return Manifest.of(clips)


def tokens(shape):
    """A model whose VAE takes 4k + 1 frames, and sizes of 16."""
    if shape.frames % 4 != 1 or shape.width % 16 or shape.height % 16:
        raise StditError(f"{shape} is not taken.")
    return shape.frames * shape.width * shape.height


def explained(kinds, **config):
    clips, config = manifest(kinds), DataConfig(**config)
    (one,) = explain_exclusions(clips, assign(clips, config), config, tokens)
    assert one.text == Reason[one.reason.upper()].text and one.clips == len(kinds)
    return clips, config, one


def taken(clips, config, **change):
    """How many of the clips a changed config takes."""
    return int((assign(clips, replace(config, **change)).bucket >= 0).sum())


def test_the_example_of_the_plan():
    """312 clips of 5 to 16 frames at 16 fps, all but a few of them of 9 or more."""
    lengths = [5] * 12 + [9 + n % 8 for n in range(300)]
    clips, config, one = explained([(n, 16, 854, 480) for n in lengths], shapes=["832x480x17", "480x832x17"])
    assert (one.reason, one.found) == ("short", "5–16 frames at 16 fps")
    assert one.remedy == "the shape 832x480x9" and one.takes == 300
    assert one.details == "5–16 frames at 16 fps; the shape 832x480x9 would take 300 of them"
    assert taken(clips, config, shapes=[*config.shapes, "832x480x9"]) == 300


@pytest.mark.parametrize(
    "kinds, shapes, reason, found",
    [
        ([(40, 16, 320, 180), (40, 16, 640, 360)] * 5, ["832x480x17"], "small", "320x180 to 640x360"),
        ([(40, 16, 480, 1040)] * 3 + [(40, 16, 490, 1000)], ["832x480x17"], "small", "x10"),
        ([(40, 16, 1080, 1920)] * 4, ["832x480x17"], "aspect", "width to height 0.5625"),
        ([(1, 1, 900, 500)] * 4, ["832x480x17"], "kind", "4 images"),
        ([(50, 16, 900, 500)] * 4, ["832x480"], "kind", "4 videos"),
        ([(7, 8, 64, 64), (30, 30, 64, 64)], ["64x64x33"], "short", "14–16 frames at 16 fps"),
    ],
)
def test_a_suggested_shape_takes_what_it_says(kinds, shapes, reason, found):
    clips, config, one = explained(kinds, shapes=shapes, max_crop=0.3, repeat_frames=True)
    assert one.reason == reason and found in one.found
    shape = one.remedy.removeprefix("the shape ")
    assert tokens(VideoShape.parse(shape))
    assert one.takes == taken(clips, config, shapes=[shape]) >= 0.5 * len(kinds)


def test_a_suggested_rate_takes_what_it_says():
    kinds = [(60, 12.5, 64, 64)] * 9 + [(60, 5, 64, 64)]
    clips, config, one = explained(kinds, shapes=["64x64x9"], fps=16.0)
    assert one.reason == "fps" and one.found == "5–12.5 fps"
    rate = float(one.remedy.removeprefix("data.fps="))
    assert one.takes == taken(clips, config, fps=rate) >= 9 and "takes" in one.details


def test_where_nothing_helps_nothing_is_suggested():
    _, _, one = explained([(2, 16, 64, 64)] * 3, shapes=["64x64x9"])
    assert (one.remedy, one.details) == (None, "2 frames at 16 fps")
    _, _, one = explained([(30, 16, 8, 8)] * 3, shapes=["64x64x9"])
    assert (one.remedy, one.details) == (None, "8x8")


def test_every_reason_is_counted_once():
    rng = np.random.default_rng(0)
    kinds = [
        (int(n), float(f), int(w), int(h))
        for n, f, w, h in zip(
            rng.integers(1, 40, 400),
            rng.choice([8, 16, 30], 400),
            rng.integers(16, 200, 400),
            rng.integers(16, 200, 400),
        )
    ]
    clips, config = manifest(kinds), DataConfig(shapes=["64x64x17", "96x64x17"])
    assignment = assign(clips, config)
    found = explain_exclusions(clips, assignment, config, tokens)
    assert {one.reason: one.clips for one in found} == assignment.reasons and len(found) == 5
    assert sum(one.clips for one in found) == int((assignment.bucket < 0).sum())
    assert all(0 < one.takes <= one.clips for one in found if one.remedy)
