"""Clips whose file is another one than was scanned: named and left out, and never stored as what they were."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import FakeVae

from stdit.data.config import DataConfig
from stdit.data.decode.checks import VideoError
from stdit.data.decode.video import read_frames
from stdit.data.decode.write import write_video
from stdit.data.load.cache import Cache, latent_key, latent_settings
from stdit.data.load.loader import Loader, local_file
from stdit.data.manifest import Manifest, read_manifest
from stdit.data.plan.buckets import assign
from stdit.data.scan.scan import scan
from stdit.pixels import to_video
from stdit.prepare.encode import encode_manifest

CONFIG = DataConfig(shapes=["32x32x5"], fps=8.0, workers=0, start="first", crop="centre")


def colour(path, value, frames=6):
    write_video(path, np.full((frames, 32, 32, 3), value, np.uint8), 8)
    return path.read_bytes()


@pytest.fixture
def clips(tmp_path):
    """A folder with two clips, each with its caption, scanned; its manifest's path."""
    (tmp_path / "v").mkdir()
    for name, value in (("a", 60), ("b", 200)):
        colour(tmp_path / "v" / f"{name}.mp4", value)
        (tmp_path / "v" / f"{name}.txt").write_text(name)
    scan(tmp_path / "v", out=tmp_path / "m.parquet", workers=1)
    return tmp_path / "m.parquet"


def train(manifest, **changes):
    """What training is given of each clip, by the name of its file."""
    config = replace(CONFIG, **changes)
    shapes = assign(manifest, config)
    rows = [type("Item", (), {"row": row, "occurrence": 0, "bucket": 0}) for row in shapes.rows(0).tolist()]
    found = Loader(manifest, shapes, config, seed=0).fetch(rows, epoch=0)
    return {os.path.basename(manifest[one.row].path): one for one in found}


def encode(manifest, out):
    config = replace(CONFIG, verify=True)  # as the command does
    return encode_manifest(manifest, assign(manifest, config), config, FakeVae(), None, out, vae_id="vae")


def later(path, seconds=5):
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def test_nothing_is_hashed_where_nothing_changed(clips, monkeypatch):
    manifest = read_manifest(clips)
    assert [json.loads(clip.state)[0] for clip in manifest] == [os.stat(clip.path).st_size for clip in manifest]
    monkeypatch.setattr("stdit.data.decode.checks.file_sha256", lambda path: pytest.fail(f"{path} is hashed"))
    assert [one.weight for one in train(manifest).values()] == [1, 1]


def test_a_clip_of_another_length_is_left_out_and_named(clips, tmp_path):
    manifest = read_manifest(clips)
    colour(tmp_path / "v" / "a.mp4", 60, frames=40)
    found = train(manifest)
    assert (found["a.mp4"].weight, found["a.mp4"].reason, found["b.mp4"].weight) == (0, "changed", 1)
    failure = found["a.mp4"].failure
    assert str(tmp_path / "v" / "a.mp4") in failure and "bytes" in failure and "stdit data scan" in failure


def test_a_clip_of_the_same_length_and_another_time_is_told_by_its_content(clips, tmp_path):
    manifest, path = read_manifest(clips), tmp_path / "v" / "a.mp4"
    before = path.read_bytes()
    later(path)
    assert train(manifest)["a.mp4"].weight == 1  # touched, copied, synced: the same
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    later(path, 10)
    assert train(manifest)["a.mp4"].reason == "changed"


def test_the_same_length_and_time_take_verify(clips, tmp_path):
    manifest, path = read_manifest(clips), tmp_path / "v" / "a.mp4"
    before, status = path.read_bytes(), os.stat(path)
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert train(manifest)["a.mp4"].weight == 1
    assert train(manifest, verify=True)["a.mp4"].reason == "changed"
    (failure,) = encode(manifest, tmp_path / "cache").failures
    assert failure[1].startswith(str(path))


def test_a_manifest_of_another_folder_is_not_this_ones(clips, tmp_path):
    (tmp_path / "other").mkdir()
    for name in ("a", "b"):
        colour(tmp_path / "other" / f"{name}.mp4", 90)
    manifest = Manifest(read_manifest(clips).table, tmp_path / "other")
    table = manifest.table
    names = [name.replace("v/", "other/") for name in table.column("path").to_pylist()]
    manifest = Manifest(table.set_column(table.column_names.index("path"), "path", [names]), tmp_path)
    assert {one.reason for one in train(manifest).values()} == {"changed"}


def test_what_changed_is_never_encoded_under_the_old_name(clips, tmp_path):
    """Red, then green, then red again: the cache holds red's latents alone, and of red itself."""
    manifest, path = read_manifest(clips), tmp_path / "v" / "a.mp4"
    red = path.read_bytes()
    colour(path, 120)
    later(path)
    done = encode(manifest, tmp_path / "cache")
    assert (done.clips, len(done.failures)) == (1, 1) and "is not the file that was scanned" in done.failures[0][1]
    assert encode(manifest, tmp_path / "cache").clips == 0  # it is still another one
    path.write_bytes(red)
    scan(tmp_path / "v", out=clips, workers=1)
    done = encode(read_manifest(clips), tmp_path / "cache")
    assert done.clips >= 1 and not done.failures
    cache = Cache.open(tmp_path / "cache", latent_settings(CONFIG, "vae"))
    for clip in read_manifest(clips):
        (at,) = cache.find([latent_key(clip.id, assign(manifest, CONFIG).shapes[0])])
        frames = torch.from_numpy(read_frames(clip.path, 5, (32, 32), 8.0))
        assert torch.equal(cache.tensor(at), FakeVae().encode(to_video(frames)[None])[0])


def test_a_file_that_is_written_to_while_it_is_read_is_left_out(clips):
    clip = read_manifest(clips)[0]

    def allocate(shape):
        later(clip.path)
        return np.empty(shape, np.uint8)

    with pytest.raises(VideoError, match="while it was being read") as caught:
        read_frames(clip.path, 5, (32, 32), 8.0, sha256=clip.sha256, allocate=allocate)
    assert caught.value.reason == "changed"


def test_a_shard_that_was_packed_anew_keeps_the_clips_that_are_the_same(tmp_path):
    contents = {name: colour(tmp_path / f"{name}.mp4", value) for name, value in (("a", 60), ("b", 200))}

    def pack(**members):
        with tarfile.open(tmp_path / "v" / "shard.tar", "w") as tar:
            for name, content in members.items():
                for suffix, data in (("mp4", content), ("txt", name.encode())):
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    (tmp_path / "v").mkdir()
    pack(**contents)
    scan(tmp_path / "v", out=tmp_path / "m.parquet", workers=1)
    manifest = read_manifest(tmp_path / "m.parquet")
    pack(**contents, more=contents["b"])
    assert [one.weight for one in train(manifest).values()] == [1, 1]
    pack(b=contents["b"], a=contents["a"])
    found = train(manifest)
    assert {one.reason for one in found.values()} <= {"changed", "damaged"} and len(found) == 2
    for clip in manifest:
        with pytest.raises(VideoError, match="is not the file that was scanned"):
            with local_file(replace(clip, path=f"file://{clip.path}")):
                pass


def test_a_file_at_a_url_is_told_by_what_its_storage_says(clips, tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    clip = read_manifest(clips)[0]
    content = Path(clip.path).read_bytes()
    system.pipe_file("/changed/a.mp4", content)
    size = str(len(content))
    there = replace(clip, path="memory://changed/a.mp4", state=json.dumps([size] + [None] * 8))
    with local_file(there):
        pass
    with local_file(replace(there, state=json.dumps([size, "another tag", *[None] * 6, "2001-01-01"]))):
        pass  # of other times, and the same
    with pytest.raises(VideoError, match=r"changed/a\.mp4: is not the file that was scanned") as caught:
        with local_file(replace(there, state=json.dumps(["9", *[None] * 8]))):
            pass
    assert caught.value.reason == "changed"
    with pytest.raises(VideoError, match="is not the file"):
        with local_file(replace(there, sha256="0" * 64, state=json.dumps([size, *[None] * 7, "2001-01-01"]))):
            pass
