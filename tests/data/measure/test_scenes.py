"""Cutting at scene changes: three scenes cut at known frames, and clips that show their own frames alone."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

from stdit.data.config import DataConfig
from stdit.data.decode.video import read_frames
from stdit.data.decode.write import write_video
from stdit.data.load.loader import Loader
from stdit.data.manifest import clip_id, read_manifest
from stdit.data.measure import scenes as module
from stdit.data.plan.buckets import assign
from stdit.data.plan.split import PlanItem
from stdit.data.scan import probing
from stdit.data.scan.scan import scan
from stdit.data.workers.pool import Worker
from stdit.errors import StditError

TICK = Fraction(1, 1600)
COLOURS = [(200, 30, 30), (30, 180, 40), (40, 40, 220)]
needs_scenedetect = pytest.mark.skipif(
    not module.available(), reason="PySceneDetect is not here: pip install 'stdit[scenes]'"
)


def three_scenes(lengths, height=48, width=64):
    """A square that moves before a ground of another colour in each scene."""
    frames = []
    for colour, length in zip(COLOURS, lengths):
        for n in range(length):
            frame = np.full((height, width, 3), colour, np.uint8)
            left = 4 + n % (width - 20)
            frame[10:22, left : left + 12] = 255 - np.array(colour)
            frames.append(frame)
    return frames


def ground(frame):
    """Which scene a frame is of."""
    return int(np.argmin([np.abs(frame[40].astype(int) - colour).mean() for colour in COLOURS]))


@needs_scenedetect
@pytest.mark.parametrize("fps", [30.0, 24.0, 29.97])
def test_three_scenes_are_cut_to_the_frame(tmp_path, fps):
    lengths = (31, 47, 40)
    write_video(tmp_path / "a.mp4", three_scenes(lengths), fps)
    (tmp_path / "a.txt").write_text("three colours")
    found = scan(tmp_path, scenes=True, workers=1).manifest
    assert [clip.frames for clip in found] == list(lengths)
    assert [clip.start * clip.fps for clip in found] == pytest.approx([0, 31, 78], abs=1e-3)
    assert [clip.end * clip.fps for clip in found] == pytest.approx([31, 78, 118], abs=1e-3)
    assert len(set(found.ids.to_pylist())) == 3 and {clip.captions[0].text for clip in found} == {"three colours"}
    for number, clip in enumerate(found):
        frames = read_frames(clip.path, clip.frames, None, clip.fps, clip.start)
        assert [ground(frame) for frame in frames] == [number] * clip.frames


@needs_scenedetect
@pytest.mark.parametrize("fps", [16.0, 7.0])
def test_a_clip_has_no_frame_of_another_scene(tmp_path, fps):
    """Read at any start that fits, at rates whose frames fall half way between two of the source's."""
    write_video(tmp_path / "a.mp4", three_scenes((40, 41, 42)), 24.0)
    found = scan(tmp_path, scenes=True, uncaptioned=True, workers=1).manifest
    most = max(n for n in range(60) if (n - 1) / fps <= 40.5 / 24)
    for frames in range(most - 2, most + 1):
        config = DataConfig(shapes=[f"64x48x{frames}"], fps=fps)
        assignment = assign(found, config)
        for seed in range(4):
            for start in ("random", "first"):
                loader = Loader(found, assignment, replace(config, start=start), seed=seed, workers=0)
                for row in np.flatnonzero(assignment.bucket >= 0):
                    (example,) = loader.fetch([PlanItem(int(row), 0, 0, 0, 0, 0)], epoch=0)
                    assert {ground(frame) for frame in example.frames.numpy()} == {int(row)}
    assert (assignment.bucket >= 0).any()


@needs_scenedetect
def test_scenes_are_looked_for_once_and_the_whole_file_is_there_again(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "cut.mp4", three_scenes((30, 30, 30)), 30.0)
    write_video(tmp_path / "in" / "whole.mp4", three_scenes((60,)), 30.0)
    asked = []

    def call(self, task, path, *args, plain=Worker.call, **arguments):
        asked.append((task, path.rpartition("/")[2]))
        return plain(self, task, path, *args, **arguments)

    monkeypatch.setattr(Worker, "call", call)
    out = tmp_path / "m.parquet"
    options = {"out": out, "uncaptioned": True, "workers": 1}
    plain = scan(tmp_path / "in", **options).manifest
    asked.clear()
    cut = scan(tmp_path / "in", scenes=True, scores=True, **options).manifest
    assert asked == [
        ("scenes", "cut.mp4"),
        *[("score", "cut.mp4")] * 3,
        ("scenes", "whole.mp4"),
        ("score", "whole.mp4"),
    ]
    assert len(cut) == 4 and cut[3] == plain[1]  # what is not cut stays the clip it was, in caches too
    grounds = np.array([[0.2126, 0.7152, 0.0722] @ np.array(colour) for colour in COLOURS])
    assert np.abs(cut.column("brightness")[:3] - grounds).max() < 20  # of each scene by itself
    asked.clear()
    assert scan(tmp_path / "in", scenes=True, scores=True, **options).manifest.hash == cut.hash
    assert scan(tmp_path / "in", **options).manifest.hash == plain.hash and not asked
    lines = [json.loads(line) for line in out.with_suffix(".probed.jsonl").read_text().splitlines()]
    assert [len(line["scenes"]) for line in lines] == [3, 0]
    assert [clip_id(clip.sha256, clip.start, clip.end) for clip in read_manifest(out)] == plain.ids.to_pylist()


def coloured(lengths):
    """Scenes of these lengths in frames; no two neighbours have one colour."""
    frames = []
    for number, length in enumerate(lengths):
        frames += [np.full((48, 64, 3), COLOURS[number % 3], np.uint8)] * length
    return frames


@needs_scenedetect
@pytest.mark.parametrize(
    "lengths, kept",
    [
        ([6, 7, 8, 20], [0, 1, 2, 3]),
        ([3] * 8, []),
        ([15, 2, 15], [0, 2]),  # a flash
        ([1, 30, 1], [1]),  # what is left of the scenes before and after
        ([2, 30, 2], [1]),
        ([20, 4, 4, 20], [0, 3]),
    ],
)
def test_scenes_nearer_than_fifteen_frames(tmp_path, lengths, kept):
    """Every clip shows one scene; what is too short for one is left out by name."""
    write_video(tmp_path / "a.mp4", coloured(lengths), 16)
    found = scan(tmp_path, scenes=True, uncaptioned=True, workers=1)
    assert [clip.frames for clip in found.manifest] == [lengths[number] for number in kept]
    for clip, number in zip(found.manifest, kept):
        frames = read_frames(clip.path, clip.frames, None, clip.fps, clip.start)
        assert {ground(frame) for frame in frames} == {number % 3}
    (left_out,) = found.skipped or (None,)
    assert (left_out is None) == (len(kept) == len(lengths))
    if left_out is not None:
        assert left_out.reason == "short_scene" and f"left out: {len(lengths) - len(kept)}" in left_out.message


def uneven_video(path, times, frames):
    """Frames at these times in seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = TICK
        for now, frame in zip(times, frames):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv420p")
            picture.pts, picture.time_base = round(now / TICK), TICK
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@needs_scenedetect
def test_a_scene_has_its_own_rate_and_end(tmp_path):
    """Two seconds at 16 fps, then seven frames at 4 fps; and the other way round."""
    fast, slow = np.arange(32) / 16, np.arange(7) / 4
    frames = coloured([32, 7])
    uneven_video(tmp_path / "a.mp4", [*fast, *(2 + slow)], frames)
    uneven_video(tmp_path / "b.mp4", [*slow, *(1.75 + fast)], frames[32:] + frames[:32])
    found = scan(tmp_path, scenes=True, uncaptioned=True, workers=1).manifest
    wanted = [(32, 16, 0, 2), (7, 4, 2, 3.75), (7, 4, 0, 1.75), (32, 16, 1.75, 3.75)]
    assert [(clip.frames, clip.fps, clip.start, clip.end) for clip in found] == [
        pytest.approx(one, abs=2e-3) for one in wanted
    ]
    for fps in (16.0, 8.0):
        assignment = assign(found, DataConfig(shapes=["64x48x9"], fps=fps))
        assert (assignment.bucket >= 0).tolist() == [True, False, False, True]
        assert assignment.reasons == {"fps": 2}


def test_what_an_older_version_found_is_looked_for_again(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", coloured([20]), 16)
    out = tmp_path / "m.parquet"
    options = {"out": out, "uncaptioned": True, "workers": 1}
    assert scan(tmp_path, **options).reused == 0 and scan(tmp_path, **options).reused == 1
    monkeypatch.setattr(probing, "FORMAT", probing.FORMAT + 1)
    assert scan(tmp_path, **options).reused == 0 and scan(tmp_path, **options).reused == 1
    memory = out.with_suffix(".probed.jsonl")
    lines = [json.loads(line) for line in memory.read_text().splitlines()]
    memory.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "format"}) + "\n" for line in lines))
    assert scan(tmp_path, **options).reused == 0  # of the time before there were numbers


def test_without_pyscenedetect_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "available", lambda: False)
    with pytest.raises(StditError, match=r"pip install 'stdit\[scenes\]'"):
        scan(tmp_path, scenes=True)
