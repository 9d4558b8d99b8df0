"""A decoder that crashes, hangs, eats memory or prints costs one clip: the marked files make it do so."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from stdit.data.config import DataConfig
from stdit.data.decode.checks import Limits, VideoError, file_sha256
from stdit.data.decode.video import probe, read_frames
from stdit.data.decode.write import write_video
from stdit.data.load.loader import Loader
from stdit.data.manifest import Caption, Clip, Manifest, clip_id
from stdit.data.plan.buckets import assign
from stdit.data.plan.split import PlanItem
from stdit.data.scan.probing import ScanOptions, probe_files
from stdit.data.scan.scan import scan
from stdit.data.workers import pool
from stdit.data.workers.pool import Reader, Worker
from stdit.errors import StditError

# Read by Python as it starts the process: what the decoder does to the files with these names.
MARKED = """
import ctypes, os, signal, time, av
plain = av.open
def marked(file, *args, **kwargs):
    name = os.path.basename(file)
    if "crash" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "once" in name and not os.path.exists(file[5:] + ".died"):
        open(file[5:] + ".died", "w").close()
        os.abort()
    if "hang" in name and not os.path.exists(file[5:] + ".free"):
        ctypes.PyDLL(None).sleep(3600)  # holds Python's lock, as a decoder in an endless loop may
    if "slow" in name:
        time.sleep(0.5)
    if "memory" in name:
        bytearray(16 << 30)
    if "print" in name:
        os.write(1, b"{a library speaks}")
    return plain(file, *args, **kwargs)
av.open = marked
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of equal clips, whose names tell the reading processes what to do."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(MARKED)
    paths = [str(tmp_path / "start"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    ramp = np.arange(8, dtype=np.uint8)[:, None, None, None] * 20 + np.arange(16, dtype=np.uint8)[:, None]
    write_video(tmp_path / "good.mp4", np.broadcast_to(ramp, (8, 16, 16, 3)), 8)
    for name in ("crash", "once", "hang", "slow", "memory", "print"):
        shutil.copyfile(tmp_path / "good.mp4", tmp_path / f"{name}.mp4")
    return tmp_path


def test_each_costs_its_own_clip(folder):
    reader = Reader()

    def read(name, **limits):
        return reader(str(folder / f"{name}.mp4"), 5, (16, 16), 8.0, limits=Limits(**limits))

    wanted = read_frames(str(folder / "good.mp4"), 5, (16, 16), 8.0)
    for name in ("good", "print", "once"):
        assert np.array_equal(read(name), wanted)
    for name, reason, says in [("crash", "crashed", "SIGSEGV"), ("memory", "too_large", "more memory")]:
        with pytest.raises(VideoError, match=rf"{name}\.mp4: .*{says}") as error:
            read(name)
        assert error.value.reason == reason
    before = time.monotonic()
    with pytest.raises(VideoError, match="longer than") as error:
        read("hang", seconds=-pool.GRACE + 1)  # at once, by any watch but the parent's
    assert error.value.reason == "timeout" and time.monotonic() - before < pool.START
    assert np.array_equal(read("good"), wanted)  # in a new process
    with pytest.raises(VideoError, match="not the file that was scanned") as error:
        reader(str(folder / "good.mp4"), 5, (16, 16), 8.0, sha256="0" * 64)
    assert error.value.reason == "changed"
    (worker,) = reader._idle
    popen = worker._process.popen
    popen.send_signal(signal.SIGTERM)  # for the run, which still needs its clips
    assert np.array_equal(read("good"), wanted) and popen.poll() is None
    popen.kill()
    popen.wait()
    assert np.array_equal(read("good"), wanted)
    reader.close()


def test_a_read_that_was_interrupted_does_not_answer_the_next(folder):
    """Ctrl-C in a session that goes on."""
    reader, path = Reader(), str(folder / "good.mp4")
    reader(path, 5, (16, 16), 8.0)
    process = reader._idle[0]._process
    answers, interrupts = process.answers, [KeyboardInterrupt()]

    def get(timeout):
        if interrupts:
            raise interrupts.pop()
        return answers.get(timeout=timeout)

    process.answers = SimpleNamespace(get=get)
    with pytest.raises(KeyboardInterrupt):
        reader(path, 5, (16, 16), 8.0)
    assert np.array_equal(reader(path, 3, (8, 8), 8.0), read_frames(path, 3, (8, 8), 8.0))
    reader.close()


@pytest.mark.parametrize("shared", [True, False])
def test_frames_of_growing_and_shrinking_size_come_back_whole(folder, monkeypatch, shared):
    if not shared:
        monkeypatch.setattr(pool, "_shared_file", lambda: None)  # as on Windows
    reader = Reader()
    path = str(folder / "good.mp4")
    kept = []
    for count, size in [(2, (16, 16)), (8, (640, 480)), (1, (8, 8)), (8, (320, 480))]:
        kept.append((reader(path, count, size, 8.0), read_frames(path, count, size, 8.0)))
    assert all(np.array_equal(got, wanted) for got, wanted in kept)  # none was written over by a later one


def test_a_process_that_does_not_start_is_an_error_not_a_skip(monkeypatch):
    monkeypatch.setattr(pool.sys, "executable", shutil.which("false"))
    with pytest.raises(StditError, match="does not start"):
        Worker().call("probe", "a.mp4", 1.0)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no masks of signals on this system")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_for_the_run_do_not_end_a_process_that_starts(folder, monkeypatch, number):
    """As a launcher sends them to all processes of a job: again and again, from the first instruction on."""
    popens, plain = [], pool.subprocess.Popen

    def started(*args, **kwargs):
        popens.append(plain(*args, **kwargs))
        popens[-1].send_signal(number)
        return popens[-1]

    monkeypatch.setattr(pool.subprocess, "Popen", started)
    monkeypatch.setattr(pool, "_start", pool._Process)  # without another try
    over = threading.Event()

    def insist():
        while not over.wait(0.002):
            for popen in popens:
                popen.send_signal(number)

    sender = threading.Thread(target=insist)
    sender.start()
    reader, path = Reader(), str(folder / "good.mp4")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        assert np.array_equal(reader(path, 5, (16, 16), 8.0), read_frames(path, 5, (16, 16), 8.0))
    finally:
        over.set()
        sender.join()
        reader.close()
    assert len(popens) == 1 and signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_start_that_fails_once_is_tried_again(folder, monkeypatch):
    popen, programs = pool.subprocess.Popen, [shutil.which("false"), pool.sys.executable]

    def started(command, **kwargs):
        return popen([programs.pop(0), *command[1:]], **kwargs)

    monkeypatch.setattr(pool.subprocess, "Popen", started)
    reader, path = Reader(), str(folder / "good.mp4")
    assert reader(path, 5, (16, 16), 8.0).shape == (5, 16, 16, 3) and not programs
    reader.close()


def test_a_file_that_hangs_is_read_once_more(folder, monkeypatch):
    """The second time it is there, as after a file server was away."""
    hanging, starts, start = folder / "hang.mp4", [], pool._start

    def counted():
        starts.append(0)
        if len(starts) == 2:
            (folder / "hang.mp4.free").touch()
        return start()

    monkeypatch.setattr(pool, "_start", counted)
    worker = Worker()
    arguments = {"count": 5, "size": (16, 16), "fps": 8.0, "start": 0.0, "crop": (0.5, 0.5), "sha256": None}
    frames = worker.call("read", str(hanging), 2.0, **arguments)["frames"]
    worker.close()
    assert np.array_equal(frames, read_frames(str(folder / "good.mp4"), 5, (16, 16), 8.0)) and len(starts) == 2


@pytest.fixture
def manifest(folder):
    sha256 = file_sha256(str(folder / "good.mp4"))
    rows = []
    for number, name in enumerate(["good", "crash", "print", "once"]):
        row = {"path": str(folder / f"{name}.mp4"), "captions": (Caption(name),), "sha256": sha256}
        size = {"frames": 8, "fps": 8.0, "width": 16, "height": 16, "start": 0.0, "end": 1 + number / 100}
        rows.append(Clip(id=clip_id(sha256, 0, size["end"]), **row, **size))
    return Manifest.of(rows, folder)


def test_a_crash_keeps_its_place_in_the_batch_and_the_others_are_as_in_process(manifest):
    config = DataConfig(shapes=["16x16x5"], fps=8.0, prefetch=2, verify=True)
    assignment = assign(manifest, config)
    items = [PlanItem(row, n, 0, 0, 0, 0) for n in range(2) for row in range(4)]
    batches = [(0, items[:3]), (0, []), (0, items[3:])]
    alone = Loader(manifest, assignment, config, seed=3, workers=0)
    wanted = list(alone.iterate(batches))  # the marks are for the other processes
    for workers in (1, 4):
        loader = Loader(manifest, assignment, config, seed=3, workers=workers, reader=Reader())
        got = list(loader.iterate(batches))
        assert [len(batch) for batch in got] == [3, 0, 5]
        for a, b in zip([e for batch in got for e in batch], [e for batch in wanted for e in batch]):
            assert (a.row, a.occurrence, a.caption) == (b.row, b.occurrence, b.caption)
            if a.row == 1:
                assert a.weight == 0 and a.reason == "crashed" and "crash.mp4" in a.failure and not a.frames.any()
            else:
                assert a.weight == 1 and a.failure is None and np.array_equal(a.frames, b.frames)


@pytest.mark.parametrize(("computes", "reason"), [(1e-9, None), (0.0, "timeout"), (1.0, "timeout")])
def test_time_is_counted_while_a_process_has_a_core(folder, monkeypatch, computes, reason):
    """Of each 0.02 s that it may take, the reading process has `computes` seconds of a core: some, none, too many."""
    worker, path, seconds = Worker(), str(folder / "slow.mp4"), itertools.count(0.0, computes)
    arguments = {"count": 3, "size": (8, 8), "fps": 8.0, "start": 0.0, "crop": (0.5, 0.5), "sha256": None}
    worker.call("read", str(folder / "good.mp4"), 60.0, **arguments)  # it has started
    monkeypatch.setattr(pool, "_cpu_seconds", lambda pid: next(seconds))
    monkeypatch.setattr(pool, "PATIENCE", 10**6)
    monkeypatch.setattr(pool, "IDLE", 1e-9)
    try:
        if reason is None:
            frames = worker.call("read", path, 0.02, **arguments)["frames"]
            assert frames.shape == (3, 8, 8, 3) and next(seconds) > 4 * computes
        else:
            with pytest.raises(VideoError, match="longer than") as error:
                worker.call("read", path, 0.02, **arguments)
            assert error.value.reason == reason
    finally:
        worker.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="counts seconds of a core by /proc")
def test_a_process_that_computes_is_told_from_one_that_waits():
    before, times = pool._cpu_seconds(os.getpid()), os.times()
    while sum(os.times()[:2]) < sum(times[:2]) + 0.1:
        pass
    assert 0.05 < pool._cpu_seconds(os.getpid()) - before < 5
    assert pool._cpu_seconds(2**22 + 1) is None


def test_probing_names_what_crashes_or_hangs(folder):
    paths = [str(folder / f"{name}.mp4") for name in ("good", "crash", "print", "hang", "once")]
    results = probe_files(paths, 2, ScanOptions(10**6), timeout=3.0)
    assert [r.path for r in results] == paths
    assert [r.reason for r in results] == [None, "crashed", None, "timeout", None]
    found = probe(paths[0])
    assert (results[0].probe["width"], results[0].probe["frames"]) == (found.width, found.frames)
    assert results[0].sha256 == results[2].sha256 == file_sha256(paths[0])


def test_the_next_scan_tries_again_what_timed_out(folder):
    clips = folder / "clips"
    clips.mkdir()
    shutil.copyfile(folder / "good.mp4", clips / "hang.mp4")
    write_video(clips / "other.mp4", np.zeros((8, 16, 16, 3), np.uint8), 8)
    look = partial(scan, clips, out=folder / "m.parquet", uncaptioned=True, timeout=1.0)
    first = look()
    assert [(one.file, one.reason) for one in first.skipped] == [("hang.mp4", "timeout")] and len(first.manifest) == 1
    (clips / "hang.mp4.free").touch()
    again = look()
    assert not again.skipped and len(again.manifest) == 2 and again.reused == 1
