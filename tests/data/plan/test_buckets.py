"""Every clip goes to one bucket or to a named reason; against a plain loop over clips and shapes."""

from __future__ import annotations

import ast
import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.data.config import FILTERS, DataConfig, ShapeRule, Stage
from stdit.data.decode.video import probe, read_frames
from stdit.data.decode.write import write_video
from stdit.data.manifest import Caption, Clip, Manifest
from stdit.data.plan.buckets import NO_REASON, Reason, assign, assign_columns, slack
from stdit.errors import StditError
from stdit.shapes import VideoShape

SHAPES = ["64x64x1", "64x64x17", "96x64x17", "64x96x9", "128x128x5", "192x128x33", "96x64x1"]


def columns(clips):
    """(frames, fps, width, height) a clip."""
    frames, fps, width, height = (np.array(c, float) for c in zip(*clips))
    end = np.where(frames == 1, 0.0, frames / fps)
    return {"frames": frames.astype(int), "fps": fps, "width": width, "height": height, "start": 0 * end, "end": end}


def by_hand(clip, config):
    """The rule in words, one clip at a time."""
    frames, fps, width, height = clip
    best = None
    for index, shape in enumerate(config.video_shapes()):
        if (frames == 1) != (shape.frames == 1):
            continue
        if frames > 1 and (fps < 0.9 * config.fps or (shape.frames - 1) / config.fps > (frames - 0.5) / fps + 1e-6):
            continue
        if not config.upscale and (width < shape.width or height < shape.height):
            continue
        kept = min(width / height, shape.width / shape.height) / max(width / height, shape.width / shape.height)
        if 1 - kept > config.max_crop + 1e-9:
            continue
        rank = (round(-math.log(kept), 9), -shape.frames, -shape.width * shape.height)
        if best is None or rank < best[0]:
            best = (rank, index)
    return -1 if best is None else best[1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.just(1), st.integers(2, 90)),
            st.sampled_from([7.0, 8.0, 24.0, 29.97, 30.0]),
            st.integers(40, 400),
            st.integers(40, 400),
        ),
        min_size=1,
        max_size=20,
    ),
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=7, unique=True),
    st.booleans(),
    st.sampled_from([0.0, 0.2, 0.6]),
)
def test_assignment_is_the_rule(clips, shapes, upscale, max_crop):
    config = DataConfig(shapes=shapes, fps=8.0, upscale=upscale, max_crop=max_crop)
    found = assign_columns(columns(clips), config.video_shapes(), config)
    assert found.bucket.tolist() == [by_hand(clip, config) for clip in clips]
    assert ((found.bucket < 0) == (found.reason >= 0)).all()
    assert found.counts.sum() + sum(found.reasons.values()) == len(clips)
    assert (found.lost <= max_crop + 1e-6).all()


@pytest.mark.parametrize(
    ("clip", "shapes", "reason"),
    [
        ((1, 1.0, 64, 64), ["64x64x17"], "kind"),
        ((40, 16.0, 64, 64), ["64x64"], "kind"),
        ((40, 12.0, 64, 64), ["64x64x17"], "fps"),
        ((15, 16.0, 64, 64), ["64x64x17"], "short"),
        ((40, 16.0, 60, 64), ["64x64x17"], "small"),
        ((40, 16.0, 200, 64), ["64x64x17"], "aspect"),
        ((15, 16.0, 200, 64), ["64x64x17", "96x96x5"], "small"),  # the furthest that one shape gets counts
        ((17, 16.0, 64, 64), ["64x64x17"], None),
        ((31, 30.0, 640, 480), ["64x48x17"], None),  # its last frame is at 1 s, like the seventeenth at 16 fps
        ((30, 30.0, 640, 480), ["64x48x17"], "short"),  # and this one's more than half a source frame before
    ],
)
def test_reasons(clip, shapes, reason):
    config = DataConfig(shapes=shapes, fps=16.0)
    found = assign_columns(columns([clip]), config.video_shapes(), config)
    assert found.reasons == ({} if reason is None else {reason: 1})
    assert found.reason[0] == (NO_REASON if reason is None else Reason[reason.upper()])


def test_frame_repeats_and_upscaling_when_asked():
    config = DataConfig(shapes=["64x64x17"], fps=16.0, repeat_frames=True, upscale=True)
    found = assign_columns(columns([(40, 8.0, 32, 32)]), config.video_shapes(), config)
    assert found.bucket.tolist() == [0]


@pytest.mark.parametrize(
    ("frames", "source", "fps"), [(17, 24.0, 24.0), (30, 30.0, 16.0), (9, 12.5, 12.0), (20, 25, 8.0)]
)
def test_whatever_is_assigned_can_be_read(tmp_path, frames, source, fps):
    """The longest clip that `slack` allows can be decoded, at its latest start; one frame more is refused."""
    write_video(tmp_path / "clip.mp4", np.zeros((frames, 16, 16, 3), np.uint8), source)
    found = probe(str(tmp_path / "clip.mp4"))
    args = (np.array([found.start]), np.array([found.end]), np.array([found.fps]))
    longest = max(n for n in range(1, 200) if slack(*args, n, fps)[0] >= 0)
    room = slack(*args, longest, fps)[0]
    assert len(read_frames(str(tmp_path / "clip.mp4"), longest, (16, 16), fps, found.start + room)) == longest
    if source == fps:
        assert longest == frames


def test_assign_of_a_manifest_and_wrong_configs():
    clip = Clip("i", "p", (Caption("c"),), 34, 16.0, 130, 70, 0.0, 34 / 16, "s")
    found = assign(Manifest.of([clip]), DataConfig(shapes=["128x64x33", "64x64x33"]))
    assert found.bucket.tolist() == [0] and found.shapes[0] == VideoShape(33, 64, 128)
    for config, says in [
        (DataConfig(), r"data\.shapes is empty"),
        (DataConfig(shapes=["64x64x5", "64×64×5"]), "names 64x64x5 twice"),
        (DataConfig(shapes=["64"]), "'64' is not a shape"),
        (DataConfig(shapes=["64x64"], fps=0), r"data\.fps is 0"),
        (DataConfig(shapes=["64x64"], crop="center"), r"data\.crop is 'center'; it must be 'random' or 'centre'"),
        (DataConfig(shapes=["64x64"], max_crop=1), r"data\.max_crop is 1"),
        (DataConfig(shapes=["64x64"], fps=math.inf), r"data\.fps is inf"),
    ]:
        with pytest.raises(StditError, match=says):
            assign(Manifest.of([clip]), config)


def test_fixed_resets_every_setting_by_which_assign_filters():
    nodes = ast.walk(ast.parse(inspect.getsource(assign)))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "config"}
    assert read - {"check", "video_shapes"} == set(FILTERS)
    fixed = DataConfig(shapes=SHAPES, filter={"motion": (1, None)}, repeats=False, crop="random").fixed()
    assert fixed == DataConfig(shapes=SHAPES, start="first", crop="centre")


def test_a_rule_is_every_area_at_every_aspect_for_every_duration():
    rule = ShapeRule(areas=["832x480", "1280x720"], aspects=["16:9", "1:1", "9:16"], durations=[0, 3, 5])
    shapes = DataConfig(rule=rule, fps=16.0).video_shapes()
    assert len(shapes) == len(set(shapes)) == 2 * 3 * 3
    assert {shape.frames for shape in shapes} == {1, 49, 81}  # 48 and 80 frames go to the nearest 1 + 4k
    for shape in shapes:
        assert shape.width % 16 == 0 and shape.height % 16 == 0
        area, aspect = (min(by, key=by.get) for by in (
            {wanted: abs(math.log(shape.width * shape.height / wanted)) for wanted in (832 * 480, 1280 * 720)},
            {wanted: abs(math.log(shape.width / shape.height / wanted)) for wanted in (16 / 9, 1, 9 / 16)},
        ))  # fmt: skip
        assert shape.width == pytest.approx(math.sqrt(area * aspect), abs=8)
        assert shape.height == pytest.approx(math.sqrt(area / aspect), abs=8)
    assert VideoShape.parse("1280x720x81") in shapes
    coarse = ShapeRule(areas=["64x64"], aspects=["1:1", "5:4"], durations=[0], multiple=32)
    assert [str(shape) for shape in DataConfig(rule=coarse).video_shapes()] == ["64x64x1"]  # rounded together


@pytest.mark.parametrize(
    ("rule", "shapes", "says"),
    [
        (dict(areas=["64x64x5"]), [], r"data\.rule: areas: 64x64x5 has frames"),
        (dict(aspects=["wide"]), [], r"data\.rule: aspects: 'wide' is not WIDTH:HEIGHT"),
        (dict(aspects=["16:0"]), [], "'16:0' is not"),
        (dict(durations=[0.1]), [], r"0\.1 s at 8 fps is less than 5 frames.*0\.5 or more"),
        (dict(), ["64x64"], r"data\.shapes and data\.rule are both set"),
        (dict(durations=[1e308]), [], r"data\.rule: durations: 1e\+308 s at 8 fps are more frames than .* shorter"),
        (dict(durations=[0, math.nan]), [], r"durations\[1\] is nan; it must be a finite number"),
        (dict(durations=[-math.inf]), [], r"durations\[0\] is -inf; it must be a finite number"),
        (dict(areas=["1" * 400 + "x64"]), [], r"data\.rule: areas: '1+x64' is not a shape.*six digits"),
        (dict(areas=["infxnan"]), [], "areas: 'infxnan' is not a shape"),
        (dict(aspects=["1e308:1"]), [], r"data\.rule: aspects: '1e308:1' is not WIDTH:HEIGHT.*1000:1"),
        (dict(aspects=["nan:1"]), [], "aspects: 'nan:1'"),
    ],
)
def test_a_wrong_rule_is_named(rule, shapes, says):
    rule = ShapeRule(**(dict(areas=["64x64"], aspects=["1:1"], durations=[1]) | rule))
    with pytest.raises(StditError, match=says):
        DataConfig(rule=rule, shapes=shapes, fps=8.0).check()


def test_a_rule_has_at_least_one_duration_and_multiples_that_sizes_can_have():
    for wrong, says in [
        (dict(durations=[]), r"durations is \[\]; it must be a list of at least 1"),
        (dict(durations=[0], multiple=0), "multiple is 0; it must be at least 1"),
        (dict(durations=[0], multiple=10**9), "multiple is 1000000000; it must be below"),
        (dict(durations=[0], multiple=10**400), "multiple is 0x.*64 bits"),
    ]:
        with pytest.raises(StditError, match=says):
            DataConfig(rule=ShapeRule(areas=["64x64"], aspects=["1:1"], **wrong)).check()


def test_stages_take_the_best_shape_within_their_limits():
    shapes = ["32x32", "64x64", "64x64x9", "64x64x17", "128x128x17"]
    stages = [Stage(epochs=2, area="64x64", frames=9), Stage(epochs=1, area="64x64"), Stage()]
    config = DataConfig(shapes=shapes, stages=stages, fps=8.0)
    clips = [(40, 8.0, 200, 200), (12, 8.0, 200, 200), (1, 1.0, 200, 200), (40, 8.0, 70, 70), (40, 8.0, 20, 20)]
    found = assign_columns(columns(clips), config.video_shapes(), config)
    picked = [[shapes[b] if b >= 0 else None for b in stage.bucket] for stage in found.stages]
    assert picked == [
        ["64x64x9", "64x64x9", "64x64", "64x64x9", None],
        ["64x64x17", "64x64x9", "64x64", "64x64x17", None],
        ["128x128x17", "64x64x9", "64x64", "64x64x17", None],
    ]
    for number, stage in enumerate(stages):  # each as if it were the only one
        alone = DataConfig(shapes=[s for s in shapes if stage.allows(VideoShape.parse(s))], fps=8.0)
        by_itself = assign_columns(columns(clips), alone.video_shapes(), alone)
        assert [alone.shapes[b] if b >= 0 else None for b in by_itself.bucket] == picked[number]
        assert by_itself.reasons == found.stages[number].reasons
    assert [config.stage_of(epoch) for epoch in range(6)] == [0, 0, 1, 2, 2, 2]
    assert DataConfig().stage_of(9) == 0
    assert found.rows().tolist() == [0, 1, 2, 3] and found.rows(shapes.index("64x64x9")).tolist() == [0, 1, 3]
    for wrong, says in [
        ([Stage(), Stage()], "stage 1 of 2 has epochs None"),
        ([Stage(epochs=1)], "stage 1 of 1 has epochs 1"),
        ([Stage(area="16x16")], "stage 1: no shape of data.shapes is within area 16x16"),
    ]:
        with pytest.raises(StditError, match=says):
            DataConfig(shapes=shapes, stages=wrong).check()
    with pytest.raises(StditError, match=r"data.stages\[0\].epochs is 0"):
        DataConfig(shapes=shapes, stages=[Stage(epochs=0)]).check()


def test_the_crop_loss_of_a_bucket_is_its_clips_mean():
    config = DataConfig(shapes=["64x64x17", "96x64x17"], fps=8.0)
    clips = [(40, 8.0, 64, 64), (40, 8.0, 100, 80), (40, 8.0, 120, 80)]
    found = assign_columns(columns(clips), config.video_shapes(), config)
    assert found.bucket.tolist() == [0, 1, 1]
    assert found.crop_losses == pytest.approx([0, (1 - 1.25 / 1.5) / 2])
