"""Scanning folders, and manifests in every format that is read."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stdit.data.decode.write import write_video
from stdit.data.manifest import SCHEMA, Caption, Clip, Manifest, clip_id, read_manifest, write_manifest
from stdit.data.scan.probing import probe_files
from stdit.data.scan.scan import scan, skipped_path
from stdit.errors import StditError


def clip(number: int, **changes) -> Clip:
    sha256 = f"{number:064x}"
    values = {
        "id": clip_id(sha256, 0.0, 2.0),
        "path": f"/videos/{number}.mp4",
        "captions": (Caption(f"clip {number}"), Caption("é" * number, 0.5)),
        "frames": 20 + number,
        "fps": 10.0,
        "width": 64,
        "height": 48,
        "start": 0.0,
        "end": 2.0,
        "sha256": sha256,
    }
    return Clip(**{**values, **changes})


def small_video(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.full((4, 16, 16, 3), value, np.uint8), 8)


def test_scan_of_real_files_names_the_broken_ones(videos, tmp_path):
    """Captioned ones become clips; the broken and the uncaptioned are named, each with its reason."""
    names = ["asl/yes.mkv", "mixed/video_90.mov", "mixed/corrupted.mp4", "mixed/sample_with_invalid_nalu.mp4"]
    broken = {
        "mixed/result.webm": "empty",
        "mixed/sample_audio_only.mp4": "no_video",
        "mixed/chunk_out_of_range.mp4": "not_media",
        "mixed/sample_malformed_free_box.mp4": "not_media",
    }
    for name in [*names, *broken]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(videos / name, tmp_path / name)
    captions = [f"{name},caption of {name}\n" for name in [*names[:3], *broken, "mixed/gone.mp4"]]
    (tmp_path / "captions.csv").write_text("file,caption\n" + "".join(captions))
    result = scan(tmp_path, out=tmp_path / "manifest.parquet", workers=2)
    assert {s.file: s.reason for s in result.skipped} == {
        **broken,
        "mixed/gone.mp4": "missing",
        "mixed/sample_with_invalid_nalu.mp4": "no_caption",
    }
    assert [s.file for s in result.damaged] == ["mixed/corrupted.mp4"]
    by_path = {row.path.removeprefix(str(tmp_path) + "/"): row for row in result.manifest}
    assert list(by_path) == sorted(names[:3])
    assert (by_path["mixed/video_90.mov"].width, by_path["mixed/video_90.mov"].height) == (320, 568)
    assert by_path["mixed/corrupted.mp4"].frames == 28 and by_path["mixed/corrupted.mp4"].end == pytest.approx(2.8)
    listed = [
        json.loads(line) for line in pathlib.Path(skipped_path(tmp_path / "manifest.parquet")).read_text().splitlines()
    ]
    assert [row["file"] for row in listed] == [s.file for s in result.skipped]


def test_a_moved_folder_keeps_ids_hash_and_paths(tmp_path):
    small_video(tmp_path / "one" / "sub" / "a.mp4", 10)
    small_video(tmp_path / "one" / "b.mp4", 200)
    for name in ("sub/a", "b"):
        (tmp_path / "one" / f"{name}.txt").write_text(f"first of {name}\n\nsecond of {name}\n")
    before = scan(tmp_path / "one", out=tmp_path / "one" / "m.parquet").manifest
    assert pq.read_table(tmp_path / "one" / "m.parquet").column("path").to_pylist() == ["b.mp4", "sub/a.mp4"]
    shutil.move(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "b.mp4").rename(tmp_path / "two" / "z.mp4")
    (tmp_path / "two" / "b.txt").rename(tmp_path / "two" / "z.txt")
    moved = read_manifest(tmp_path / "two" / "m.parquet")
    assert moved.hash == before.hash
    assert moved[1].path == str(tmp_path / "two" / "sub" / "a.mp4")
    assert moved[1].captions == (Caption("first of sub/a"), Caption("second of sub/a"))
    again = scan(tmp_path / "two").manifest
    assert sorted(again.ids.to_pylist()) == sorted(before.ids.to_pylist())


def test_what_did_not_change_is_not_probed_again(tmp_path, monkeypatch):
    """Neither by the same scan later nor by one that goes on after it was killed."""
    probed: list[str] = []

    def counted(paths, **options):
        probed.extend(path.rpartition("/")[2] for path in paths)
        return probe_files(paths, **options)

    monkeypatch.setattr("stdit.data.scan.scan.probe_files", counted)
    out = tmp_path / "out" / "m.parquet"
    for name in ("a", "b", "c"):
        small_video(tmp_path / "in" / f"{name}.mp4", 50 * ord(name) % 255)
    (tmp_path / "in" / "d.mp4").write_text("no video")
    first = scan(tmp_path / "in", out=out, uncaptioned=True, workers=1)
    assert probed == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"] and first.reused == 0
    probed.clear()
    small_video(tmp_path / "in" / "b.mp4", 200)
    (tmp_path / "in" / "c.mp4").unlink()
    memory = out.with_suffix(".probed.jsonl")
    lines = memory.read_text().splitlines(keepends=True)
    memory.write_text("".join(lines[1:]) + lines[0][:40])  # killed as it wrote what it found of the first
    again = scan(tmp_path / "in", out=out, uncaptioned=True, workers=1)
    assert probed == ["a.mp4", "b.mp4"] and again.reused == 1
    assert again.skipped == first.skipped and [s.reason for s in again.skipped] == ["not_media"]
    fresh = scan(tmp_path / "in", uncaptioned=True, workers=1)
    assert again.manifest.hash == fresh.manifest.hash == read_manifest(out).hash != first.manifest.hash
    assert [json.loads(line)["path"].rpartition("/")[2] for line in memory.read_text().splitlines()] == [
        "a.mp4", "b.mp4", "d.mp4"
    ]  # fmt: skip


def test_equal_files_become_one_clip_with_both_captions(tmp_path):
    small_video(tmp_path / "a.mp4")
    shutil.copyfile(tmp_path / "a.mp4", tmp_path / "b.mp4")
    Image.new("RGB", (20, 30)).save(tmp_path / "c.png")
    rows = [{"file": "a.mp4", "captions": ["one", {"text": "two", "weight": 3}]}, {"file": "b.mp4", "caption": "three"}]
    rows += [{"file": "c.png", "caption": "an image"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = scan(tmp_path)
    assert [(s.file, s.reason) for s in result.skipped] == [("b.mp4", "duplicate")]
    assert result.manifest[0].captions == (Caption("one"), Caption("two", 3.0), Caption("three"))
    assert result.manifest[1].image and (result.manifest[1].width, result.manifest[1].height) == (20, 30)


def test_folders_behind_links_are_scanned_once_and_unreadable_ones_are_named(tmp_path, monkeypatch):
    """Data is often linked together from several disks; a circle of links ends."""
    for number, name in enumerate(["in/a.mp4", "disk/b.mp4", "disk/deep/c.mp4", "in/locked/d.mp4"]):
        small_video(tmp_path / name, 50 * number)
    for link, folder in [("in/disk", "disk"), ("in/again", "disk"), ("disk/deep/up", "in"), ("in/gone", "nowhere")]:
        (tmp_path / link).symlink_to(tmp_path / folder)

    def scandir(path, plain=os.scandir):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    result = scan(tmp_path / "in", uncaptioned=True, workers=1)
    names = [clip.path.removeprefix(f"{tmp_path}/in/") for clip in result.manifest]
    assert names == ["a.mp4", "again/b.mp4", "again/deep/c.mp4"]
    assert [(s.file, s.reason) for s in result.skipped] == [("locked", "unreadable")]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a system without a limit to some cores")
def test_as_many_files_are_probed_at_once_as_there_are_cores_to_use(tmp_path, monkeypatch):
    small_video(tmp_path / "a.mp4")
    asked = []

    def probe(paths, workers, **options):
        asked.append(workers)
        return probe_files(paths, workers, **options)

    monkeypatch.setattr("stdit.data.scan.scan.probe_files", probe)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    scan(tmp_path, uncaptioned=True)
    assert asked == [3]


def test_only_what_is_neither_a_clip_nor_its_captions_is_of_another_type(tmp_path):
    small_video(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a clip")
    (tmp_path / "notes.txt").write_text("to do")
    for _ in range(2):  # the second finds what the first wrote beside the manifest
        assert sum(scan(tmp_path, out=tmp_path / "m.parquet", workers=1).ignored.values()) == 1
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,from the table\n")
    assert sum(scan(tmp_path, out=tmp_path / "m.parquet", workers=1).ignored.values()) == 2  # of no use beside a table


def test_captions_of_a_larger_folder_serve_a_part_of_it(tmp_path):
    small_video(tmp_path / "part" / "a.mp4")
    small_video(tmp_path / "other" / "b.mp4", 9)
    (tmp_path / "all.csv").write_text('\ufefffile,caption,weight\npart/a.mp4,"red, left",2\nother/b.mp4,blue,\n')
    result = scan(tmp_path / "part", tmp_path / "all.csv")
    assert [c.captions for c in result.manifest] == [(Caption("red, left", 2.0),)] and not result.skipped
    (tmp_path / "elsewhere").mkdir()
    small_video(tmp_path / "elsewhere" / "a.mp4")
    with pytest.raises(StditError, match=r"all\.csv captions no file in .*elsewhere: names in it are"):
        scan(tmp_path / "elsewhere", tmp_path / "all.csv")
    assert len(scan(tmp_path / "elsewhere", tmp_path / "all.csv", uncaptioned=True).manifest) == 1


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("c.csv", "name,text\na.mp4,x\n", "must name the columns file and caption"),
        ("c.csv", "file,caption\na.mp4,red, left\n", "line 2 has more fields"),
        ("c.csv", "file,caption,weight\na.mp4,red,-1\n", "positive weight"),
        ("c.jsonl", '{"file": "a.mp4"\n', "line 1 is not JSON"),
        ("c.jsonl", '{"caption": "x"}\n', "line 1 names no file"),
        ("c.txt", "x", "must be a .csv, .jsonl"),
    ],
)
def test_a_wrong_captions_file_is_an_error_with_its_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(StditError, match=says) as error:
        scan(tmp_path, tmp_path / name)
    assert name in str(error.value)


def test_parquet_round_trip_keeps_everything(tmp_path):
    manifest = Manifest.of([clip(i) for i in range(5)])
    manifest.table = manifest.table.append_column("motion", pa.array(np.arange(5.0)))
    write_manifest(manifest, tmp_path / "m.parquet")
    back = read_manifest(tmp_path / "m.parquet")
    assert list(back) == list(manifest) and back.hash == manifest.hash
    assert back.column("motion").tolist() == [0, 1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["m.parquet"]
    with pytest.raises(StditError, match=r"no column 'motoin'\. Did you mean 'motion'"):
        back.column("motoin")


def test_the_hash_is_of_content_alone(tmp_path):
    clips = [clip(i) for i in range(6)]
    whole = Manifest.of(clips)
    chunked = Manifest(pa.concat_tables([Manifest.of(clips[:2]).table, Manifest.of(clips[1:]).table.slice(1)]))
    assert chunked.hash == whole.hash
    moved = [clip(i, path=f"/elsewhere/{i}.mp4") for i in range(6)]
    assert Manifest.of(moved).hash == whole.hash
    for change in ({"fps": 11.0}, {"captions": (Caption("clip 3"), Caption("ééé", 0.25))}, {"captions": ()}):
        assert Manifest.of([*clips[:3], clip(3, **change), *clips[4:]]).hash != whole.hash
    assert Manifest.of(clips[::-1]).hash != whole.hash
    assert Manifest.of([]).hash == Manifest(SCHEMA.empty_table()).hash


def test_jsonl_and_csv_are_read(tmp_path):
    sha256 = "ab" * 32
    row = {"path": "a.mp4", "frames": 20, "fps": 10, "width": 64, "height": 48, "sha256": sha256}
    (tmp_path / "m.jsonl").write_text(json.dumps({**row, "captions": ["x", {"text": "y", "weight": 2}]}) + "\n")
    (tmp_path / "m.csv").write_text(
        ",".join([*row, "caption"]) + "\n" + ",".join([*map(str, row.values()), "x"]) + "\n"
    )
    for name, captions in [("m.jsonl", (Caption("x"), Caption("y", 2.0))), ("m.csv", (Caption("x"),))]:
        found = read_manifest(tmp_path / name)[0]
        assert (found.start, found.end, found.captions) == (0.0, 2.0, captions)
        assert found.id == clip_id(sha256, 0.0, 2.0) and found.path == str(tmp_path / "a.mp4")


def rows_text(name, rows):
    if name.endswith(".jsonl"):
        return "\n".join(map(json.dumps, rows))
    lines = [
        ",".join(rows[0]),
        *(",".join('"' + str(v).replace('"', '""') + '"' for v in row.values()) for row in rows),
    ]
    return "\n".join(lines)


GOOD = {"path": "a.mp4", "frames": 20, "fps": 10, "width": 64, "height": 48, "sha256": "ab" * 32}


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
@pytest.mark.parametrize("column", ["captions", "caption", "Text"])
def test_a_string_where_a_list_of_captions_is_wanted_is_one_caption(tmp_path, name, column):
    text = 'a dog,\u2028"big"\n' + "x" * 200_000  # longer than the csv module's own limit
    (tmp_path / name).write_text(rows_text(name, [{**GOOD, column: text}]))
    assert read_manifest(tmp_path / name)[0].captions == (Caption(text),)


@pytest.mark.parametrize("values", [["a dog", "a cat"], [["a dog"], ["a cat"]]])
def test_texts_in_a_parquet_are_captions(tmp_path, values):
    table = Manifest.of([clip(1), clip(2)]).table.drop_columns(["captions"])
    for column in ("captions", "text"):
        pq.write_table(table.append_column(column, pa.array(values)), tmp_path / "m.parquet")
        found = read_manifest(tmp_path / "m.parquet")
        assert [one.captions for one in found] == [(Caption("a dog"),), (Caption("a cat"),)]
    pq.write_table(table.append_column("captions", pa.array([1, 2])), tmp_path / "m.parquet")
    with pytest.raises(StditError, match=r"m\.parquet: row 0: has 1 as captions"):
        read_manifest(tmp_path / "m.parquet")


def test_a_manifest_row_whose_caption_is_no_text_is_left_out_by_name(tmp_path, caplog):
    rows = [{**GOOD, "sha256": f"{i:064x}", "captions": text} for i, text in enumerate(["\ud83d", "fine", 5, "a\0b"])]
    (tmp_path / "m.jsonl").write_text(rows_text("m.jsonl", rows))
    assert [c.captions for c in read_manifest(tmp_path / "m.jsonl")] == [(Caption("fine"),)]
    said = [record.getMessage() for record in caplog.records]
    assert [f"m.jsonl, line {line} has" in message for line, message in zip((1, 3, 4), said)] == [True] * 3
    assert len(said) == 3 and all("left out" in message for message in said)
    with pytest.raises(StditError, match=r"row 0 has the caption .*NUL"):
        Manifest.of([clip(1, captions=(Caption("a\0b"),))])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"frames": "many"}, "frames is 'many'"),
        ({"frames": 20.5}, "frames is 20.5 .*whole number"),
        ({"fps": True}, "fps is True"),
        ({"fps": 0}, "frames is 20, fps 0"),
        ({"width": {}}, "width is {}"),
        ({"path": 5}, "path is 5 .*a text"),
        ({"sha256": "\ud800"}, "sha256 is .*half of a character"),
        ({"frames": 10**400}, "frames is 1000.*int too large"),
    ],
)
def test_a_wrong_value_is_named_with_line_and_column(tmp_path, change, says):
    (tmp_path / "m.jsonl").write_text(rows_text("m.jsonl", [{**GOOD, **change}]))
    with pytest.raises(StditError, match=rf"m\.jsonl, line 1: {says}"):
        read_manifest(tmp_path / "m.jsonl")


def test_an_open_quotation_mark_in_a_manifest_is_named(tmp_path):
    lines = 'path,frames,fps,width,height,sha256,caption\na.mp4,20,10,64,48,aa,"red\nb.mp4,20,10,64,48,bb,5"\n'
    (tmp_path / "m.csv").write_text(lines)
    with pytest.raises(StditError, match=r"m\.csv, line 2: a quotation mark"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("path,frames,Frames\n")
    with pytest.raises(StditError, match="names frames twice"):
        read_manifest(tmp_path / "m.csv")


def test_wrong_manifests_say_where(tmp_path):
    with pytest.raises(StditError, match="no such manifest"):
        read_manifest(tmp_path / "m.parquet")
    (tmp_path / "m.parquet").write_text("not parquet")
    with pytest.raises(StditError, match="cannot be read as Parquet"):
        read_manifest(tmp_path / "m.parquet")
    with pytest.raises(StditError, match="lacks the columns fps, sha256"):
        Manifest(Manifest.of([clip(1)]).table.drop_columns(["fps", "sha256"]))
    with pytest.raises(StditError, match="rows 0 and 2 have the same id"):
        Manifest.of([clip(1), clip(2), clip(1)])
    for caption, says in [(Caption("x", -1.0), "-1.0"), (Caption("x", float("nan")), "nan"), (Caption(None), "None")]:
        with pytest.raises(StditError, match=rf"row 2 has the caption .*{says}"):
            Manifest.of([clip(1), clip(2, captions=()), clip(3, captions=(Caption("ok"), caption))])
    with pytest.raises(StditError, match="row 1 has width 0"):
        Manifest.of([clip(1), clip(2, width=0)])
    (tmp_path / "m.jsonl").write_text('{"path": "a.mp4", "fps": "fast"}\n')
    with pytest.raises(StditError, match="line 1 has no id"):
        read_manifest(tmp_path / "m.jsonl")
    row = {"path": "a.mp4", "frames": 9, "fps": 8, "width": 8, "height": 8, "sha256": "00", "captions": [{"txt": "a"}]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    with pytest.raises(StditError, match=r"m\.jsonl, line 1 has the keys 'txt' in captions"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b'{"path": "l\xe4ufe.mp4"}\n')
    with pytest.raises(StditError, match=r"m\.jsonl, line 1: path is .*is not UTF-8"):
        read_manifest(tmp_path / "m.jsonl")
    table = Manifest.of([clip(1)]).table.replace_schema_metadata({"stdit_manifest": "99"})
    pq.write_table(table, tmp_path / "new.parquet")
    with pytest.raises(StditError, match="manifest format 99"):
        read_manifest(tmp_path / "new.parquet")
    with pytest.raises(StditError, match="written as Parquet"):
        write_manifest(Manifest.of([clip(1)]), tmp_path / "m.csv")
