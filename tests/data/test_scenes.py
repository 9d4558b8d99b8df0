"""Cutting at scene changes: three scenes cut at known frames, and clips that show their own frames alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from stdit.data import scenes as module
from stdit.data.buckets import DataConfig, assign
from stdit.data.isolated import Worker
from stdit.data.loader import Loader
from stdit.data.manifest import clip_id, read_manifest
from stdit.data.packs import PlanItem
from stdit.data.scan import scan
from stdit.data.video_io import read_frames, write_video
from stdit.errors import StditError

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


def test_without_pyscenedetect_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "available", lambda: False)
    with pytest.raises(StditError, match=r"pip install 'stdit\[scenes\]'"):
        scan(tmp_path, scenes=True)
