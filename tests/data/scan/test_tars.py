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

from stdit.data.config import DataConfig
from stdit.data.decode.checks import VideoError
from stdit.data.decode.video import probe, read_frames
from stdit.data.decode.write import write_video
from stdit.data.load.loader import Loader
from stdit.data.manifest import Caption, read_manifest
from stdit.data.plan.buckets import assign
from stdit.data.plan.split import PlanItem
from stdit.data.remote.paths import split_member
from stdit.data.scan import scan as scan_module
from stdit.data.scan.listing import File
from stdit.data.scan.scan import scan
from stdit.data.scan.tars import tar_members
from stdit.data.workers.pool import Reader


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
    one, other = (table.drop_columns(["path", "file_state"]) for table in tables)
    assert one == other


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


def members_of(path, entries):
    """(name, its captions or why there are none) of a tar of (name, content, or a type and what it links to)."""
    with tarfile.open(path, "w") as shard:
        for name, content in entries:
            if isinstance(content, bytes):
                add(shard, name, content)
                continue
            info = tarfile.TarInfo(name)
            info.type, info.linkname = content
            shard.addfile(info)
    members, damage = tar_members(File("s.tar", str(path), None), str(path))
    assert damage is None
    return [
        (m.name.removeprefix("s.tar/"), m.refused or (m.caption_fault or [c.text for c in m.captions])) for m in members
    ]


KEYS = [("0.mp4", b"1"), ("0.txt", b"one"), ("1.mp4", b"2"), ("1.txt", b"two")]


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_keys_that_come_twice_keep_their_own_captions(tmp_path, order):
    """Shards joined, their captions before or behind the clips; also two of one key side by side."""
    second = [(name, content.replace(b"o", b"0")) for name, content in KEYS]
    entries = [*KEYS, *second][order]
    texts = dict.fromkeys(["one", "two", "0ne", "tw0"])
    assert [said for _, said in members_of(tmp_path / "a.tar", entries)] == [[text] for text in texts][order]
    pairs = [*KEYS[:2][order], *second[:2][order]]
    assert [said for _, said in members_of(tmp_path / "a.tar", pairs)] == [["one"], ["0ne"]]


def test_a_key_that_comes_twice_gives_no_clip_another_ones_caption(tmp_path):
    found = dict(members_of(tmp_path / "a.tar", [*KEYS, ("0.png", b"3"), ("2.mp4", b"4"), ("2.json", b"[]")]))
    assert found["0.mp4"] == ["one"] and found["1.mp4"] == ["two"]
    assert found["0.png"] == ("no_caption", "the tar has several 0, and no caption is next to this one.")
    assert found["2.mp4"] == ("no_caption", "2.json has nothing in caption.")
    apart = [("0.mp4", b"1"), ("1.mp4", b"2"), ("0.json", b'"j"'), ("1.txt", b"two"), ("0.txt", b""), ("1.json", b"{}")]
    assert members_of(tmp_path / "a.tar", apart) == [("0.mp4", ["j"]), ("1.mp4", ["two"])]


def test_links_are_followed_and_what_cannot_be_read_is_refused(tmp_path):
    symbolic, hard = tarfile.SYMTYPE, tarfile.LNKTYPE
    entries = [
        ("s/0.mp4", (symbolic, "../blobs/aa")), ("s/0.txt", (symbolic, "../blobs/bb")), ("blobs/aa", b"video"),
        ("blobs/bb", b"text"), ("s/1.mp4", (symbolic, "0.mp4")), ("/s/2.mp4", (hard, "blobs/aa")), ("s/2.txt", b"2"),
        ("s/3.mp4", (symbolic, "/etc/passwd")), ("s/4.mp4", (symbolic, "../../blobs/aa")),
        ("s/5.mp4", (hard, "s/9.mp4")), ("s/6.mp4", (symbolic, "6.mp4")), ("s/7.mp4", (tarfile.FIFOTYPE, "")),
        ("s/8.mp4", (tarfile.CHRTYPE, "")), ("s/9.mp4", b"9"), ("s/9.txt", (symbolic, "nowhere.txt")),
        ("s/d.mp4", (tarfile.DIRTYPE, "")), ("s/._0.mp4", b"x"), ("s/é\nx.mp4", b""),
    ]  # fmt: skip
    found = members_of(tmp_path / "a.tar", entries)
    said = {name: value if isinstance(value, list) else value[0] for name, value in found}
    assert said == {
        "s/0.mp4": ["text"], "s/1.mp4": [], "s/2.mp4": ["2"], "s/3.mp4": "link", "s/4.mp4": "link", "s/5.mp4": "link",
        "s/6.mp4": "link", "s/7.mp4": "special", "s/8.mp4": "special", "s/9.mp4": "bad_caption", "s/é\nx.mp4": [],
    }  # fmt: skip
    assert "s/nowhere.txt" not in str(found) and "symbolic link to nowhere.txt" in dict(found)["s/9.mp4"][1]
    members, _ = tar_members(File("s.tar", "s.tar", None), str(tmp_path / "a.tar"))
    for member in (split_member(file.path) for file in members[:3]):
        assert _bytes(member._replace(tar=str(tmp_path / "a.tar"))) == b"video"


def test_links_sparse_and_empty_members_are_clips_or_named_by_a_scan(plain, tmp_path):
    video = (plain / "0.mp4").read_bytes()
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        add(shard, "a.mp4", video)
        add(shard, "a.txt", b"a")
        for name, kind in (("b.mp4", tarfile.LNKTYPE), ("c.mp4", tarfile.SYMTYPE), ("d.mp4", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.mp4"
            shard.addfile(info)
            add(shard, name.replace("mp4", "txt"), name.encode())
        add(shard, "e.mp4", b"")
        info = tarfile.TarInfo("f.mp4")  # as GNU tar writes sparse files in pax format
        info.size, info.pax_headers = len(video), {"GNU.sparse.map": f"0,{len(video)}", "GNU.sparse.size": str(1 << 20)}
        shard.addfile(info, io.BytesIO(video))
    for _ in range(2):  # from the tar, and as an earlier scan remembers it
        result = scan(tmp_path, out=tmp_path / "m.parquet", uncaptioned=True, workers=1)
        assert [c.text for c in result.manifest[0].captions] == ["a", "b.mp4", "c.mp4"] and len(result.manifest) == 1
        assert {s.file.removeprefix("s.tar/"): s.reason for s in result.skipped} == {
            "b.mp4": "duplicate", "c.mp4": "duplicate", "d.mp4": "special", "e.mp4": "empty", "f.mp4": "sparse"
        }  # fmt: skip


def test_json_captions_of_a_tar_say_what_is_wrong_in_them(plain, tmp_path):
    rows = {"0": {"caption": ["x", "y"]}, "1": {"blurb": "z"}, "2": {"caption": "a", "weight": 0}}
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for (key, row), file in zip(rows.items(), ("0.mp4", "1.mkv", "2.webm")):
            add(shard, f"{key}.mp4", (plain / file).read_bytes())
            add(shard, f"{key}.JSON", json.dumps(row).encode())
    result = scan(tmp_path, out=tmp_path / "m.parquet", workers=1)
    assert [[c.text for c in clip.captions] for clip in result.manifest] == [["x", "y"]]
    assert {s.file: s.reason for s in result.skipped} == {"s.tar/1.mp4": "no_caption", "s.tar/2.mp4": "bad_caption"}
    assert "1.JSON" in result.skipped[0].message and "'blurb'" in result.skipped[0].message
    result = scan(tmp_path, out=tmp_path / "m.parquet", caption_column="blurb", workers=1)  # asked anew
    assert [clip.captions for clip in result.manifest] == [(Caption("z"),)]


def test_a_compressed_tar_by_another_name_is_named(plain, tmp_path):
    (tmp_path / "a.tar").write_bytes(gzip.compress(pack(plain, tmp_path / "whole").read_bytes()))
    (skipped,) = scan(tmp_path, uncaptioned=True, workers=1).skipped
    assert "it is gzip" in skipped.message
