"""A disk that fails for a while costs no clip: each place that a scan reads is tried again, and then the scan stops."""

from __future__ import annotations

import builtins
import errno
import io
import os
import tarfile

import numpy as np
import pytest

from stdit.data.decode.write import write_video
from stdit.data.load import loader as loader_module
from stdit.data.load.loader import local_file
from stdit.data.manifest import Caption, Clip, Manifest, clip_id
from stdit.data.remote.failures import StorageError
from stdit.data.remote.storage import STORAGE
from stdit.data.scan import probing
from stdit.data.scan.scan import scan
from stdit.data.workers.pool import Worker
from stdit.prepare import caption as caption_module
from stdit.prepare.caption import caption_manifest

TRIES = 3


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(STORAGE, "tries", TRIES)
    monkeypatch.setattr(STORAGE, "pause", 0.001)


@pytest.fixture
def folder(tmp_path):
    """Videos with captions beside them, one without a suffix, one in a folder, two in a tar."""
    folder = tmp_path / "clips"
    (folder / "in").mkdir(parents=True)
    for number, name in enumerate(["a.mp4", "b", "in/c.mp4"]):
        write_video(folder / f"{number}.mp4", np.full((4, 16, 16, 3), 40 * number, np.uint8), 8)
        (folder / f"{number}.mp4").rename(folder / name)
        (folder / f"{name.removesuffix('.mp4')}.txt").write_text(f"clip {name}")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number in (3, 4):
            write_video(folder / "one.mp4", np.full((4, 16, 16, 3), 40 * number, np.uint8), 8)
            tar.add(folder / "one.mp4", f"{number}.mp4")
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
        (folder / "one.mp4").unlink()
    return folder


class Failing:
    """Makes a function fail for the first calls that concern a name."""

    def __init__(self, monkeypatch, place, function, name, times, number=errno.ESTALE):
        self.left, inner = times, getattr(place, function)

        def call(*arguments, **options):
            if self.left and any(str(value).endswith(name) for value in arguments):
                self.left -= 1
                raise OSError(number, os.strerror(number), name)
            return inner(*arguments, **options)

        monkeypatch.setattr(place, function, call)


PLACES = [
    (os, "scandir", "clips/in"),  # a folder's list
    (os, "stat", "clips/a.mp4"),  # a file's size and time
    (builtins, "open", "clips/b"),  # its first bytes, which tell that it is a video
    (io, "open", "clips/a.txt"),  # a caption, by pathlib
]


@pytest.mark.parametrize(("place", "function", "name"), PLACES, ids=["scandir", "stat", "open", "read"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_what_passes_changes_nothing_and_what_stays_stops_the_scan(
    folder, tmp_path, monkeypatch, place, function, name, number
):
    wanted = scan(folder, out=tmp_path / "wanted" / "m.parquet", workers=1)
    assert len(wanted.manifest) == 5 and not wanted.skipped
    for times in (TRIES - 1, 10**6):
        with monkeypatch.context() as patch:
            failing = Failing(patch, place, function, name, times, number)
            out = tmp_path / str(times) / "m.parquet"
            if times < TRIES:
                found = scan(folder, out=out, workers=1)
                assert failing.left == 0 and found.manifest.hash == wanted.manifest.hash and not found.skipped
            else:
                with pytest.raises(StorageError, match=os.strerror(number)) as error:
                    scan(folder, out=out, workers=1)
                assert error.value.reason == "unreachable" and not out.exists()


@pytest.mark.parametrize("what", ["headers", "caption"])
def test_a_tar_that_cannot_be_read_for_a_while_loses_no_member(folder, monkeypatch, what):
    if what == "headers":
        inner, left = tarfile.TarFile.next, [3]

        def step(self):
            left[0] -= 1
            if left[0] in (0, 1):  # in the middle, twice
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return inner(self)

        monkeypatch.setattr(tarfile.TarFile, "next", step)
    else:
        Failing(monkeypatch, builtins, "open", "shard.tar", 1)
    found = scan(folder, workers=1)
    assert len(found.manifest) == 5 and not found.skipped and not found.damaged


@pytest.mark.parametrize("task", ["probe", "score"])
def test_a_probe_that_meets_a_failing_disk_is_asked_again(folder, tmp_path, monkeypatch, task):
    inner, left = Worker.call, [TRIES - 1]

    def call(self, asked, path, *arguments, **options):
        if asked == task and path.endswith("a.mp4") and left[0]:
            left[0] -= 1
            if task == "probe":
                return {"probe": None, "sha256": None, "reason": "unreachable", "message": "the storage failed."}
            raise probing.VideoError(path, "unreachable", "the storage failed.")
        return inner(self, asked, path, *arguments, **options)

    monkeypatch.setattr(Worker, "call", call)
    out = tmp_path / "m.parquet"
    found = scan(folder, out=out, scores=True, workers=1)
    assert len(found.manifest) == 5 and not found.skipped and left == [0]
    left[0] = 10**6
    out.unlink()
    (tmp_path / "m.probed.jsonl").unlink()
    with pytest.raises(StorageError, match=r"a\.mp4.*3 tries failed.*the storage failed"):
        scan(folder, out=out, scores=True, workers=1)
    left[0] = 0
    again = scan(folder, out=out, scores=True, workers=1)  # goes on
    assert again.manifest.hash == found.manifest.hash


def one_clip(path):
    state = "[1, 1]"  # another size and time than the file's, so that its content is compared
    return Clip(clip_id("0" * 64, 0, 0.5), path, (Caption("a"),), 4, 8.0, 16, 16, 0.0, 0.5, "0" * 64, state)


def test_comparing_a_file_with_the_scanned_one_survives_a_failing_disk(folder, monkeypatch):
    clip = one_clip(str(folder / "shard.tar#512+4/a.mp4"))
    failures = [OSError(errno.EIO, "Input/output error")] * (TRIES - 1)

    def check(path, sha256):
        if failures:
            raise failures.pop()

    monkeypatch.setattr(loader_module, "check_content", check)
    with local_file(clip):
        assert not failures
    failures += [OSError(errno.ESTALE, "Stale file handle")] * TRIES
    with pytest.raises(StorageError, match="Stale file handle"), local_file(clip):
        pass


def test_captioning_stops_and_does_not_leave_clips_out(folder, tmp_path, monkeypatch):
    class Captioner:
        def frames(self, wanted):
            return 1

        def caption(self, clips, fps):
            return ["a text"] * len(clips)

    found = scan(folder, workers=1).manifest
    inner, left = caption_module.READER, [TRIES - 1]

    def reader(path, *arguments, **options):
        if path.endswith("c.mp4") and left[0]:
            left[0] -= 1
            raise probing.VideoError(path, "unreachable", "the storage failed.")
        return inner(path, *arguments, **options)

    monkeypatch.setattr(caption_module, "READER", reader)
    done = caption_manifest(found, Captioner(), tmp_path / "o.parquet", maker="m")
    assert done.captioned == 5 and not done.failures
    left[0] = 10**6
    with pytest.raises(StorageError, match=r"c\.mp4.*the storage failed"):
        caption_manifest(Manifest.of(list(found)), Captioner(), tmp_path / "p.parquet", maker="m")
    left[0] = 0
    assert not (tmp_path / "p.parquet").exists()
    done = caption_manifest(found, Captioner(), tmp_path / "p.parquet", maker="m")
    assert done.captioned + done.reused == 5
