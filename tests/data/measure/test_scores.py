"""Scores against closed forms, scipy and scikit-image; what a scan looks at; and `data.filter`."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pytest
import scipy.ndimage
import skimage.color
from PIL import Image

from stdit.data.config import DataConfig, Stage
from stdit.data.decode.checks import LIMITS, VideoError
from stdit.data.manifest import Manifest, read_manifest
from stdit.data.measure import scores as module
from stdit.data.measure.scores import SCORES, FrameRun, laplacian, lit_box, sample_runs, score, scores_of
from stdit.data.plan.buckets import assign
from stdit.data.scan.scan import scan
from stdit.data.workers.pool import Worker
from stdit.errors import StditError


def write_exactly(path, frames, fps, times=None):
    """A file whose frames are decoded to the very same RGB values."""
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("png", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (times[number] if times else number / fps)), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def textures(count, height=48, width=64, seed=0):
    """Frames that have nothing to do with one another, without a black row."""
    return np.random.default_rng(seed).integers(30, 256, (count, height, width, 3), dtype=np.uint8)


def test_grey_is_skimage_s_and_the_laplacian_scipy_s(tmp_path):
    frames = textures(5)
    path = write_exactly(tmp_path / "a.mov", frames, 8.0)
    (run,) = sample_runs(path, 0.0, 5 / 8, 5, LIMITS)
    wanted = 255 * skimage.color.rgb2gray(frames)  # whose weights are rounded otherwise, in the fourth place
    assert np.abs(run.grey - wanted[:4]).max() < 0.1
    inner = scipy.ndimage.laplace(run.grey[2].astype(np.float64))[1:-1, 1:-1]
    assert np.allclose(laplacian(run.grey[2]), inner, atol=1e-3)
    found = score(path, 0.0, 5 / 8, 5)
    assert found["sharpness"] == pytest.approx(inner.var(), rel=1e-4)
    assert found["brightness"] == pytest.approx(wanted[:4].mean(), rel=1e-3)


@pytest.mark.parametrize("fps", [8.0, 30.0])
def test_a_moving_wave_has_the_motion_and_sharpness_that_follow(fps):
    """Grey levels 128 + a·sin(k·x − w·t), with whole periods in the picture and blocks that average 4 pixels."""
    a, k, w, height, width = 90.0, 2 * math.pi / 64, 1.7, 8, 64
    times = [n / fps for n in range(4)]
    x, t = np.arange(width), np.array(times)[:, None, None]
    grey = np.broadcast_to(128 + a * np.sin(k * x - w * t), (4, height, width)).astype(np.float32)
    found = scores_of([FrameRun(times, grey)])
    assert found["brightness"] == pytest.approx(128, rel=1e-5)
    assert found["sharpness"] == pytest.approx(a**2 / 2 * (2 - 2 * math.cos(k)) ** 2, rel=0.05)  # without its borders
    # the mean of |sin(z + d) − sin(z)| over z is 4/π·|sin(d/2)|, a block's mean of a wave sin(2k)/(4·sin(k/2)) of it
    step = 4 / math.pi * math.sin(w / fps / 2) * math.sin(2 * k) / (4 * math.sin(k / 2))
    assert found["motion"] == pytest.approx(a * step * fps, rel=0.02)  # 16 blocks stand for the integral
    assert found["still_frames"] == 0.0


def test_still_frames_are_counted(tmp_path):
    """32 frames, of which each comes twice, then each four times: 16 places' pairs are seen one by one."""
    for times, share in [(1, 0.0), (2, 2 / 3), (4, 1.0)]:
        frames = textures(32)[np.arange(32) // times]
        path = write_exactly(tmp_path / f"{times}.mov", frames, 16.0)
        found = score(path, 0.0, 2.0, 32)
        assert found["still_frames"] == pytest.approx(share)
        assert (found["motion"] == 0.0) == (times == 4)


def test_black_bars_are_measured_and_looked_inside(tmp_path):
    inside = textures(4)
    plain = score(write_exactly(tmp_path / "plain.mov", inside, 8.0), 0.0, 0.5, 4)
    framed = np.full((4, 48 + 30, 64 + 8, 3), 16, np.uint8)
    framed[:, 12:60, 5:69] = inside
    framed[:2, 3, 40] = 255  # a logo's corner is none of the picture
    found = score(write_exactly(tmp_path / "framed.mov", framed, 8.0), 0.0, 0.5, 4)
    assert plain["black_bars"] == 0
    assert found["black_bars"] == pytest.approx(1 - 48 * 64 / (78 * 72))
    assert {name: found[name] for name in SCORES if name != "black_bars"} == pytest.approx(
        {name: plain[name] for name in SCORES if name != "black_bars"}
    )
    assert found["fingerprint"] == plain["fingerprint"]
    black = score(write_exactly(tmp_path / "black.mov", 0 * inside, 8.0), 0.0, 0.5, 4)
    assert (black["black_bars"], black["brightness"], black["still_frames"]) == (1, 0, 1)
    night = np.zeros((4, 40, 40), np.float32)
    night[1, 10:20] = 200  # lit in one frame of four
    assert lit_box(night) == (10, 20, 0, 40)


def test_places_are_even_and_seeking_looks_at_the_same_frames(tmp_path, monkeypatch):
    """20.8 s with a keyframe every 2 s: a frame's grey level is its number."""
    path = str(tmp_path / "long.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "20", "crf": "10"})
        stream.width = stream.height = 16
        for number in range(208):
            rgb = np.full((16, 16, 3), number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    wanted = [number for place in range(8) for number in range(26 * place + 11, 26 * place + 15)]
    for far in (0.5, math.inf):
        monkeypatch.setattr(module, "SEEK_FROM", far)
        looked = sample_runs(path, 0.0, 20.8, 208, LIMITS)
        assert [round(10 * now) for run in looked for now in run.times] == wanted
        assert np.abs([grey.mean() for run in looked for grey in run.grey] - np.array(wanted)).max() < 3
    part = sample_runs(path, 10.0, 12.0, 20, LIMITS)
    numbers = [round(10 * now) for run in part for now in run.times]
    assert numbers == sorted(set(numbers)) and numbers[0] >= 100 and numbers[-1] < 120 and len(part) == 5
    with pytest.raises(VideoError, match="has no frame from"):
        sample_runs(path, 30.0, 31.0, 10, LIMITS)


def test_a_large_picture_is_scaled_down_and_an_image_does_not_move(tmp_path):
    Image.fromarray(np.kron(textures(1, 9, 16)[0], np.ones((80, 80, 1), np.uint8))).save(tmp_path / "a.png")
    (run,) = sample_runs(str(tmp_path / "a.png"), 0.0, 0.0, 1, LIMITS)
    assert run.grey.shape == (1, 360, 640)
    found = score(str(tmp_path / "a.png"), 0.0, 0.0, 1)
    assert found["motion"] is None and found["still_frames"] is None
    assert found["brightness"] == pytest.approx(255 * skimage.color.rgb2gray(textures(1, 9, 16)).mean(), rel=0.01)


def fill(folder):
    """Three clips, bright, dark and still, and an image."""
    folder.mkdir()
    moving = textures(12)
    for name, frames in {"bright": moving, "dark": moving // 2, "still": moving[[0] * 12]}.items():
        write_exactly(folder / f"{name}.mov", frames, 8.0)
    Image.fromarray(textures(1, seed=5)[0]).save(folder / "image.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "in")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Their manifest with scores, as it is read back."""
    folder = tmp_path_factory.mktemp("scored")
    scan(fill(folder / "in"), out=folder / "m.parquet", uncaptioned=True, scores=True, workers=1)
    return read_manifest(folder / "m.parquet")


@pytest.fixture
def calls(monkeypatch):
    """What the reading processes are asked for: (task, file)."""
    asked = []

    def call(self, task, path, *args, plain=Worker.call, **arguments):
        asked.append((task, path.rpartition("/")[2]))
        return plain(self, task, path, *args, **arguments)

    monkeypatch.setattr(Worker, "call", call)
    return asked


def test_a_scan_adds_scores_without_doing_anything_twice(folder, tmp_path, calls):
    out = tmp_path / "m.parquet"
    names = ["bright.mov", "dark.mov", "image.png", "still.mov"]
    plain = scan(folder, out=out, uncaptioned=True, workers=1)
    assert calls == [("probe", name) for name in names] and "motion" not in read_manifest(out).table.column_names
    calls.clear()
    scored = scan(folder, out=out, uncaptioned=True, scores=True, workers=1)
    assert calls == [("score", name) for name in names] and scored.reused == 0
    assert scored.manifest.hash == plain.manifest.hash  # a run that has begun goes on
    calls.clear()
    write_exactly(folder / "dark.mov", textures(12, seed=3), 8.0)
    again = scan(folder, out=out, uncaptioned=True, scores=True, workers=1)
    assert calls == [("probe", "dark.mov"), ("score", "dark.mov")] and again.reused == 3
    calls.clear()
    scan(folder, out=out, uncaptioned=True, workers=1)  # forgets none
    assert scan(folder, out=out, uncaptioned=True, scores=True, workers=1).reused == 4 and not calls
    found = read_manifest(out)
    for row, clip in enumerate(found):
        wanted = score(clip.path, clip.start, clip.end, clip.frames)
        assert {name: found.table.column(name)[row].as_py() for name in SCORES} == pytest.approx(
            {name: wanted[name] for name in SCORES}, nan_ok=True
        )


def test_a_clip_whose_scoring_crashes_costs_itself(folder, tmp_path, monkeypatch):
    out = tmp_path / "m.parquet"
    scan(folder, out=out, uncaptioned=True, workers=1)
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(
        "import os, av\nplain = av.open\n"
        "av.open = lambda file, *a, **k: os.abort() if 'dark' in file else plain(file, *a, **k)\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "start"), os.environ.get("PYTHONPATH", "")]))
        found = scan(folder, out=out, uncaptioned=True, scores=True, workers=1)
    assert [(s.file, s.reason) for s in found.skipped] == [("dark.mov", "crashed")] and len(found.manifest) == 3
    assert len(scan(folder, out=out, uncaptioned=True, scores=True, workers=1).manifest) == 4  # it may have been memory


def test_filters_leave_clips_out_by_name(scored):
    names = [clip.path.rpartition("/")[2] for clip in scored]
    config = DataConfig(shapes=["64x48x5", "64x48"], fps=8.0, stages=[Stage(1, frames=1), Stage()])
    kept = assign(scored, config)
    assert not kept.reasons

    def reasons(**filters):
        found = assign(scored, replace(config, **filters))
        for stage, unfiltered in zip(found.stages, kept.stages):
            for row in range(len(scored)):
                if not found.reason[row] >= 5:
                    assert stage.bucket[row] == unfiltered.bucket[row]
                else:
                    assert stage.bucket[row] == -1 and stage.lost[row] == 0
        return {names[row]: list(found.reasons) for row in np.flatnonzero(found.bucket < 0)}

    assert reasons(filter={"motion": (1.0, None)}) == {"still.mov": ["motion"]}  # an image has no motion, and stays
    assert reasons(filter={"still_frames": (None, 0.5)}) == {"still.mov": ["still_frames"]}
    assert reasons(filter={"brightness": (100, 200), "motion": (None, 1e9)}) == {"dark.mov": ["brightness"]}
    assert reasons(filter={"black_bars": (None, 0.1), "sharpness": (None, None)}) == {}
    assert set(reasons(filter={"brightness": (255, None)})) == set(names)
    assert not assign(scored, replace(config, filter={"brightness": (255, None)}).fixed()).reasons


def test_a_wrong_filter_says_what_to_do(scored):
    config = DataConfig(shapes=["64x48x5"], fps=8.0)
    plain = Manifest(scored.table.drop_columns([*SCORES, "repeats"]))
    for filters, says in [
        ({"filter": {"motoin": (1.0, None)}}, r"motoin is not a score\. Did you mean 'motion'.*data scan --scores"),
        ({"filter": {"motion": (2.0, 1.0)}}, r"motion \[2, 1\] lets nothing through"),
        (
            {"filter": {"motion": (1.0, None)}},
            r"no column motion, which data\.filter needs: run `stdit data scan --scores`",
        ),
        ({"repeats": False}, r"no column repeats, which data\.repeats needs: run `stdit data scan --scores`"),
    ]:
        with pytest.raises(StditError, match=says):
            assign(plain, replace(config, **filters))
    index = scored.table.column_names.index("brightness")
    column = scored.table.column("brightness").to_pylist()
    column[2] = None
    holed = Manifest(scored.table.set_column(index, "brightness", pa.array(column)))
    with pytest.raises(StditError, match="row 2 has no brightness"):
        assign(holed, replace(config, filter={"brightness": (1.0, None)}))
