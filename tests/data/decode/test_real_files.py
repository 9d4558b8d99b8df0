"""The files of shared/videos, good and broken, against what PyAV alone says of them (goldens/videos.py)."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from stdit.data.decode.checks import Limits, VideoError
from stdit.data.decode.video import probe, read_frames
from stdit.data.scan.probing import ScanOptions, probe_files
from stdit.data.workers.pool import Reader, Worker

GOLDEN = json.loads(Path(__file__).with_name("goldens").joinpath("videos.json").read_text())
PIXELS = 40_000_000  # that a file is decoded for here; the rest of its frames are counted


def check(name, found):
    """found: the fields of a Probe, or a reason."""
    golden = GOLDEN[name]
    if "reason" in golden:
        assert found == golden["reason"], name
        return
    assert (found["width"], found["height"]) == (golden["width"], golden["height"]), name
    assert found["frames"] == golden["frames"] and bool(found["damage"]) == golden["damaged"], name
    assert found["fps"] == pytest.approx(golden["fps"], rel=0.02), name


def in_process(path, function, *arguments):
    try:
        return function(path, *arguments)
    except VideoError as error:
        return error.reason


def test_every_file_is_what_pyav_says_or_named(videos):
    names = [entry["file"] for entry in json.loads((videos / "videos.json").read_text())]
    assert sorted(names) == sorted(GOLDEN)
    for name in names:
        found = in_process(str(videos / name), probe, PIXELS)
        check(name, found if isinstance(found, str) else vars(found))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_processes_say_and_read_the_same(videos, workers):
    """Nothing crashes, nothing takes 30 seconds, and any number of workers reads the same bytes."""
    paths = [str(videos / name) for name in GOLDEN]
    for name, result in zip(GOLDEN, probe_files(paths, workers, ScanOptions(PIXELS), timeout=30.0)):
        check(name, result.probe or result.reason)
    arguments = (5, (48, 32), 8.0)
    with ThreadPoolExecutor(workers) as pool:
        reader = Reader()
        got = list(pool.map(lambda path: in_process(path, reader, *arguments), paths))
    for name, path, one in zip(GOLDEN, paths, got):
        assert np.array_equal(one, in_process(path, read_frames, *arguments)), name
        golden = GOLDEN[name]
        named = {golden.get("reason"), "too_short", "damaged" if golden.get("damaged") else "too_short"}
        assert isinstance(one, np.ndarray) or one in named, (name, one)


def test_a_read_of_a_long_4k_file_stays_under_a_gigabyte(videos):
    """Of address space, Python and FFmpeg included; from the beginning and from the middle."""
    path = str(videos / "mixed/long_4k_av1.mp4")
    for start in (0.0, 200.0):
        arguments = {"count": 16, "size": (128, 72), "fps": 30.0, "start": start}
        frames = Worker().call("read", path, 300.0, Limits(seconds=300.0), 1 << 30, **arguments)["frames"]
        assert frames.shape == (16, 72, 128, 3)
