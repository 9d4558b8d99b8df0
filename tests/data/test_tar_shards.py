"""Tar shards in WebDataset's layout: their clips are those of the same files in a folder, read where they lie."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stdit.data import scan as scan_module
from stdit.data.buckets import DataConfig, assign
from stdit.data.isolated import Reader
from stdit.data.listing import File, tar_members
from stdit.data.loader import Loader
from stdit.data.manifest import Caption, read_manifest
from stdit.data.packs import PlanItem
from stdit.data.paths import split_member
from stdit.data.scan import scan
from stdit.data.video_io import VideoError, probe, read_frames, write_video


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of four videos of different formats and an image, with captions beside."""
    folder = tmp_path_factory.mktemp("plain")
    for number, suffix in enumerate((".mp4", ".mkv", ".webm", ".MP4")):
        frames = np.random.default_rng(number).integers(0, 256, (6, 16, 16 + 8 * number, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", frames, 8)
        (folder / f"{number}.mp4").rename(folder / f"{number}{suffix}")
        (folder / f"{number}.txt").write_text(f"clip {number}\nanother\n")
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / "4.png")
    (folder / "4.txt").write_text("an image")
    return folder


def add(shard, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    shard.addfile(info, io.BytesIO(content))


def pack(plain, path, folder="", format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as shard:
        for file in sorted(plain.iterdir()):
            add(shard, folder + file.name, file.read_bytes())
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_its_clips_are_those_of_the_files(plain, tmp_path, format):
    pack(plain, tmp_path / "000.tar", "./deep/" + "long" * 20 + "/", format)
    found = scan(tmp_path, out=tmp_path / "m.parquet", workers=1)
    wanted = scan(plain, workers=1)
    wanted, got = ({clip.id: replace(clip, path="") for clip in result.manifest} for result in (wanted, found))
    assert got == wanted and len(found.manifest) == 5 and not found.skipped and not found.ignored
    size = (tmp_path / "000.tar").stat().st_size
    for clip in read_manifest(tmp_path / "m.parquet"):
        member = split_member(clip.path)
        assert member.tar == str(tmp_path / "000.tar") and member.offset + member.size < size
        assert (plain / member.name.rpartition("/")[2]).read_bytes() == _bytes(member)
        same = str(plain / member.name.rpartition("/")[2])
        assert probe(clip.path) == probe(same)
        count = min(5, clip.frames)
        assert np.array_equal(read_frames(clip.path, count, (16, 16), 8.0), read_frames(same, count, (16, 16), 8.0))


def _bytes(member):
    with open(member.tar, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def test_they_are_scored_as_the_files_are(plain, tmp_path):
    pack(plain, tmp_path / "000.tar")
    tables = [scan(folder, scores=True, workers=1).manifest.table.sort_by("id") for folder in (plain, tmp_path)]
    assert tables[0].drop_columns(["path"]) == tables[1].drop_columns(["path"])


def test_the_loader_reads_them_in_processes_of_their_own(plain, tmp_path):
    pack(plain, tmp_path / "000.tar")
    found = scan(tmp_path, workers=1).manifest
    config = DataConfig(shapes=["16x16x5", "16x16"], fps=8.0, max_crop=0.7, verify=True)
    assignment = assign(found, config)
    items = [PlanItem(row, 0, int(assignment.bucket[row]), 0, 0, 0) for row in range(5)]
    reader = Reader()
    got = Loader(found, assignment, config, seed=3, workers=1, reader=reader).fetch(items, epoch=0)
    reader.close()
    assert [example.weight for example in got] == [1] * 5
    here = Loader(found, assignment, config, seed=3, workers=0).fetch(items, epoch=0)
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(got, here))


def test_captions_of_every_kind(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, content in {
            "a/text.mp4": b"1", "a/text.txt": b"one\n\ntwo\n", "a/text.json": b'{"caption": "not this"}',
            "a/json.mp4": b"2", "a/json.json": b'{"captions": ["three", {"text": "four", "weight": 2}]}',
            "b/json.mp4": b"3", "b/json.json": b'{"text": "five", "url": "x"}',
            "a/none.mp4": b"4", "a/bad.mp4": b"5", "a/bad.json": b"{", "a/latin.mp4": b"6", "a/latin.txt": b"\xe4",
            "a/two.high.mp4": b"7", "a/two.txt": b"six", "a/._two.mp4": b"8", "../../etc/out.mp4": b"9", "x.cls": b"0",
        }.items():  # fmt: skip
            add(shard, name, content)
    members, damage = tar_members(File("s/a.tar", "s3://b/s/a.tar", ["state"]), str(tmp_path / "a.tar"))
    assert damage is None
    assert {file.name.removeprefix("s/a.tar/"): file.captions for file in members} == {
        "a/text.mp4": (Caption("one"), Caption("two")),
        "a/json.mp4": (Caption("three"), Caption("four", 2.0)),
        "b/json.mp4": (Caption("five"),),
        "a/none.mp4": (),
        "a/bad.mp4": (),
        "a/latin.mp4": (),
        "a/two.high.mp4": (Caption("six"),),
        "etc/out.mp4": (),
    }
    assert all(split_member(file.path).tar == "s3://b/s/a.tar" and file.state == ["state"] for file in members)


def test_a_table_of_captions_comes_first(plain, tmp_path):
    pack(plain, tmp_path / "000.tar")
    (tmp_path / "captions.csv").write_text("file,caption\n000.tar/1.mkv,from the table\n")
    result = scan(tmp_path, workers=1)
    texts = {split_member(clip.path).name: [c.text for c in clip.captions] for clip in result.manifest}
    assert texts["1.mkv"] == ["from the table"] and texts["2.webm"] == ["clip 2", "another"]


def test_what_is_wrong_with_a_tar_is_named(plain, tmp_path):
    whole = pack(plain, tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as shard:
        third = shard.getmembers()[4].offset  # 2.txt follows, then 2.webm
    (tmp_path / "whole.tar").unlink()
    (tmp_path / "cut.tar").write_bytes(whole[: third + 100])
    (tmp_path / "garbage.tar").write_bytes(whole[:third] + b"\xff" * 2048 + whole[third + 2048 :])
    (tmp_path / "none.tar").write_bytes(b"not a tar at all" * 100)
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(whole))
    result = scan(tmp_path, workers=1)
    reasons = {skipped.file: (skipped.reason, skipped.message) for skipped in result.skipped}
    assert reasons["none.tar"][0] == "not_media" and "compressed" in reasons["packed.tar.gz"][1]
    assert {d.file for d in result.damaged} == {"cut.tar", "garbage.tar"}
    assert len(result.manifest) == 2  # those before the damage, once
    first = result.manifest[0].path
    member = split_member(first)
    beyond = str(member._replace(size=1 << 30))
    with pytest.raises(VideoError, match="beyond the end of its tar") as error:
        read_frames(beyond, 1)
    assert error.value.reason == "damaged"


def test_an_unchanged_tar_is_not_opened_again(plain, tmp_path, monkeypatch):
    pack(plain, tmp_path / "000.tar")
    first = scan(tmp_path, out=tmp_path / "m.parquet", workers=1)
    assert first.reused == 0 and json.loads((tmp_path / "m.probed.jsonl").read_text().splitlines()[0])["members"]
    monkeypatch.setattr(scan_module, "tar_members", None)
    again = scan(tmp_path, out=tmp_path / "m.parquet", workers=1)
    assert again.reused == 5 and again.manifest.hash == first.manifest.hash
    monkeypatch.undo()
    with tarfile.open(tmp_path / "000.tar", "a") as shard:
        add(shard, "new.mp4", (plain / "0.mp4").read_bytes()[:-1] + b"!")
        add(shard, "new.txt", b"new")
    changed = scan(tmp_path, out=tmp_path / "m.parquet", workers=1)
    assert changed.reused == 0 and len(changed.manifest) == 6
