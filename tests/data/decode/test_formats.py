"""What a file is, by its bytes: in a folder, in a tar and in a bucket every media file is a clip or named."""

from __future__ import annotations

import io
import os
import shutil
import tarfile

import fsspec
import numpy as np
import pytest
from pictures import save_moving, see_through
from PIL import Image

from stdit.data.decode.formats import content_of
from stdit.data.decode.write import write_video
from stdit.data.scan.scan import scan


@pytest.mark.parametrize(
    "head, wanted",
    [
        (b"\0\0\0\x20ftypisom" + bytes(20), "video"),
        (b"\0\0\0\x20ftypM4A " + bytes(20), None),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif" + bytes(20), "avif"),
        (b"\0\0\0\x1cftypmsf1\0\0\0\0avisavif" + bytes(20), "animated avif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0heic" + bytes(20), "heif"),
        (b"\0\0\0\x18ftyphevc\0\0\0\0mif1" + bytes(20), "heif sequence"),
        (b"\0\0\0\x18ftypcrx \0\0\0\0isom" + bytes(20), "raw"),
        (b"\x1aE\xdf\xa3" + bytes(20), "video"),
        ((b"G" + bytes(187)) * 3, "video"),
        (b"GIF is a format", None),
        (b"BMW is a car, and no picture", None),
        (b"P5 is a processor", "netpbm"),
        (b"Good morning", None),
        (b"", None),
    ],
)
def test_what_first_bytes_tell(head, wanted):
    assert content_of(head) == wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Media under their own, other and no suffixes, and what is no media."""
    here = tmp_path_factory.mktemp("mixed")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    for suffix, form in (("avif", "AVIF"), ("jfif", "JPEG"), ("jp2", "JPEG2000"), ("jpe", "JPEG"), ("bmp", "BMP")):
        picture.rotate(len(suffix) * 7).save(here / f"{form}_{suffix}.{suffix}", form)
    picture.transpose(0).save(here / "nameless", "PNG")
    picture.transpose(1).save(here / "really_a_jpeg.png", "JPEG")
    save_moving(here / "moving.dat", see_through(8), format="WEBP")
    write_video(here / "clip.m4v", see_through(8)[..., :3], 8)
    write_video(here / "film.mp4", see_through(9)[..., :3], 8)
    os.rename(here / "film.mp4", here / "film.v1")
    (here / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60))
    (here / "photo.jxl").write_bytes(b"\xff\x0a" + bytes(60))
    (here / "drawing.svg").write_text("<svg/>")
    (here / "sound.ogg").write_bytes(b"OggS" + bytes(60))
    (here / "notes.json").write_text("{}")
    (here / "data.xyz").write_bytes(b"nothing known")
    (here / "README").write_text("read me")
    return here


CLIPS = {
    "AVIF_avif.avif": 1, "JPEG_jfif.jfif": 1, "JPEG2000_jp2.jp2": 1, "JPEG_jpe.jpe": 1, "BMP_bmp.bmp": 1, "nameless": 1,
    "really_a_jpeg.png": 1, "moving.dat": 8, "clip.m4v": 8, "film.v1": 9,
}  # fmt: skip
NAMED = {"photo.heic", "photo.jxl", "drawing.svg", "sound.ogg"}


def named(found):
    return {skipped.file.rpartition("/")[2] for skipped in found.skipped}


def test_every_media_file_of_a_folder_is_a_clip_or_named(folder):
    found = scan(folder, uncaptioned=True, workers=2)
    assert {os.path.basename(clip.path): clip.frames for clip in found.manifest} == CLIPS
    assert named(found) == NAMED
    assert {s.reason for s in found.skipped} <= {"unsupported", "not_media", "no_video", "undecodable", "damaged"}
    assert found.ignored == {".json": 1, ".xyz": 1, "": 1}


def test_and_of_a_tar(folder, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in sorted(os.listdir(folder)):
            tar.add(folder / name, name)
            text = tarfile.TarInfo(name.partition(".")[0] + ".txt")
            text.size = 6
            if name != "README":
                tar.addfile(text, io.BytesIO(b"a clip"))
    found = scan(tmp_path, workers=2)
    assert {clip.path.rpartition("/")[2]: clip.frames for clip in found.manifest} == CLIPS
    assert named(found) == NAMED


def test_and_of_a_bucket(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("STDIT_LOCAL", str(tmp_path / "copies"))
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/mixed/", recursive=True)
    try:
        found = scan("memory://mixed", uncaptioned=True, workers=2)
    finally:
        store.rm("/mixed", recursive=True)
    assert {clip.path.rpartition("/")[2]: clip.frames for clip in found.manifest} == CLIPS
    assert named(found) == NAMED and found.ignored == {".json": 1, ".xyz": 1, "": 1}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_named_and_waits_for_nobody(folder, tmp_path):
    shutil.copy(folder / "clip.m4v", tmp_path)
    for name in ("pipe.mp4", "pipe"):
        os.mkfifo(tmp_path / name)
    found = scan(tmp_path, uncaptioned=True, workers=1)
    assert len(found.manifest) == 1 and {s.file: s.reason for s in found.skipped} == {"pipe.mp4": "unreadable"}
    assert found.skipped[0].message == "is not a regular file."
