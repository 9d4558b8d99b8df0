"""Captions in tables (CSV, JSONL, Parquet) and in files beside the clips."""

from __future__ import annotations

import json
import shutil
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stdit.data.captions import Caption, Names, captions_of, read_captions, sidecar_captions
from stdit.data.decode.write import write_video
from stdit.data.scan.listing import Folder
from stdit.data.scan.scan import scan
from stdit.errors import StditError

NFC, NFD = (unicodedata.normalize(form, "Käfer.mp4") for form in ("NFC", "NFD"))


def read(folder, name, content, files=("a.mp4", "b.mp4", "c.mp4"), **columns):
    for file in files:
        (folder / file).touch()
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return read_captions(path, str(folder), Names(Folder(str(folder))), **columns)


def texts(found):
    return {file: [caption.text for caption in captions] for file, captions in found.texts.items()}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"caption": "a dog"}, ["a dog"]),
        ({"captions": "a dog"}, ["a dog"]),  # a string where a list is wanted is one caption, not letters
        ({"caption": ["one", None, "", {"text": "two"}]}, ["one", "two"]),
        ({"captions": ["one"], "caption": "other"}, ["one"]),
        ({"caption": None, "text": "t"}, ["t"]),
        ({"caption": " \n", "text": "t"}, ["t"]),
        ({"captions": [], "Prompt ": "p"}, ["p"]),
        ({"CAPTION": "a\u2028b\x85c\fd"}, ["a\u2028b\x85c\fd"]),
        ({"url": "x", "width": 3}, []),
    ],
)
def test_captions_by_the_usual_names(row, wanted):
    assert [caption.text for caption in captions_of(row)] == wanted


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"caption": 5}, "has 5 as caption"),
        ({"caption": True}, "has True as caption"),
        ({"captions": ["ok", ["nested"]]}, "as captions"),
        ({"caption": {"en": "x"}}, "the keys 'en' in caption"),
        ({"caption": "x", "weight": "12 kg"}, "weight '12 kg'.*positive weight"),
        ({"caption": {"text": "x", "weight": float("nan")}}, "weight nan"),
        ({"caption": "x", "weight": True}, "weight True"),
        ({"text": "x\ud83d"}, r"a text that has half of a character \(U\+D83D"),
        ({"text": "x\0"}, "a text that has a NUL"),
    ],
)
def test_what_is_no_caption_is_named(row, says):
    with pytest.raises(StditError, match=says):
        captions_of(row)


def test_a_bad_row_costs_its_own_clip(tmp_path):
    rows = ['{"file": "a.mp4", "caption": "half \\ud83d"}', '{"file": "b.mp4", "caption": "nul \\u0000"}']
    rows += [
        '{"file": "c.mp4", "caption": "fine \\ud83d\\ude00"}',
        '{"file": "d\\u0000.mp4", "caption": "x"}',
        "{",
        "{}",
    ]
    found = read(tmp_path, "c.jsonl", "\n".join(rows))
    assert texts(found) == {"c.mp4": ["fine 😀"]}
    assert {file: message.partition(" a caption")[0] for file, (_, message) in found.faults.items()} == {
        "a.mp4": f"{tmp_path}/c.jsonl, line 1 has",
        "b.mp4": f"{tmp_path}/c.jsonl, line 2 has",
    }
    assert [where.rpartition(" ")[2] for where, _ in found.rows] == ["4", "5", "6"]
    found = read(tmp_path, "c.csv", b"file,caption\na.mp4,caf\xe9\nb.mp4,fine\nc.mp4\n")
    assert texts(found) == {"b.mp4": ["fine"]}
    assert "line 2 has a caption that is not UTF-8 (byte 0xe9" in found.faults["a.mp4"][1]
    assert "line 4 has fewer fields" in found.faults["c.mp4"][1]


@pytest.mark.parametrize("last", ["b.mp4,blue\nc.mp4,green\n", 'b.mp4,a disk of 5"\nc.mp4,green\n'])
def test_an_open_quotation_mark_does_not_take_rows_that_name_files(tmp_path, last):
    with pytest.raises(StditError, match=r"c\.csv, line 2: a quotation mark opens a field"):
        read(tmp_path, "c.csv", f'file,caption\na.mp4,"red\n{last}')
    found = read(tmp_path, "c.csv", 'file,caption\na.mp4,"red\nx.mp4,\nblue"\nb.mp4,two\n')
    assert texts(found) == {"a.mp4": ["red\nx.mp4,\nblue"], "b.mp4": ["two"]}


@pytest.mark.parametrize(
    "content",
    [
        "file;caption;weight\na.mp4;red, left;2\n",
        "File\tCaption \tWEIGHT\na.mp4\tred, left\t2\n",
        '\ufefffile,caption,weight\r\n"a.mp4", "red, left", 2\r\n,,\r\n',
        "file;caption;weight\na.mp4;red, left;2\n".encode("utf-16"),
        b"file|caption|weight\ra.mp4|red, left|2\r",  # lines of old Macs
        'weight,file_name,text\n2,./a.mp4,"red, left"\n',
        'file,captions\na.mp4,"[{""text"": ""red, left"", ""weight"": 2}]"\n',
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, content):
    assert read(tmp_path, "c.csv", content).texts == {"a.mp4": [Caption("red, left", 2.0)]}


def test_columns_can_be_named(tmp_path):
    rows = [
        {"video": "a.mp4", "short": "x", "long text": "red", "caption": "no"},
        {"video": "b.mp4", "Long Text": ["blue"]},
    ]
    names = {"file_column": "video", "caption_column": "long text"}
    wanted = {"a.mp4": ["red"], "b.mp4": ["blue"]}
    assert texts(read(tmp_path, "c.jsonl", "\n".join(map(json.dumps, rows)), **names)) == wanted
    assert texts(read(tmp_path, "c.csv", "video,caption,long text\na.mp4,no,red\nb.mp4,no,blue\n", **names)) == wanted
    pq.write_table(
        pa.table({"video": ["a.mp4", "b.mp4"], "long text": [["red"], ["blue"]], "n": [1, 2]}), tmp_path / "t"
    )
    assert texts(read(tmp_path, "c.parquet", (tmp_path / "t").read_bytes(), **names)) == wanted
    assert sidecar_captions(b'{"caption": "no", "long text": "red"}', "a.json", "long text")[0] == [Caption("red")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.csv", "name,description\na.mp4,red\n"),
        ("c.jsonl", '{"name": "a.mp4", "description": "red"}\n'),
        ("c.jsonl", '{"file": "a.mp4", "description": "red"}\n'),
        ("c.parquet", None),
    ],
)
def test_missing_columns_are_an_error_that_lists_those_there(tmp_path, name, content):
    if content is None:
        pq.write_table(pa.table({"name": ["a.mp4"], "description": ["red"]}), tmp_path / "t")
        content = (tmp_path / "t").read_bytes()
    with pytest.raises(StditError, match=r"description.*--file-column and --caption-column"):
        read(tmp_path, name, content)


def test_a_column_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(StditError, match="first line names caption twice"):
        read(tmp_path, "c.csv", "file,caption,Caption \na.mp4,red,blue\n")
    assert texts(read(tmp_path, "c.csv", "file,caption,x,x\na.mp4,red,1,2\n")) == {"a.mp4": ["red"]}


@pytest.mark.parametrize(("there", "named"), [(NFC, NFD), (NFD, NFC)])
def test_unicode_forms_that_look_alike_are_one_name(tmp_path, there, named):
    assert there != named
    assert texts(read(tmp_path, "c.csv", f"file,caption\n{named},a beetle\n", [there])) == {there: ["a beetle"]}
    assert Names([f"{there}.tar"]).find(f"{named}.tar/0.mp4") == [f"{there}.tar/0.mp4"]
    sub = tmp_path / "sub"
    sub.mkdir()
    (sub / there).touch()
    (sub / f"{named[:-4]}.TXT").write_text("a beetle")
    assert Folder(str(sub)).sidecars([there]).texts == {there: [Caption("a beetle")]}


def test_names_that_differ_in_form_alone_are_told_apart_or_named(tmp_path):
    both = [NFC, NFD]
    assert texts(read(tmp_path, "c.csv", f"file,caption\n{NFC},one\n{NFD},two\n", both)) == {NFC: ["one"], NFD: ["two"]}
    mixed = "Ka\u0308fer-\u00e4.mp4"
    forms = [unicodedata.normalize(form, mixed) for form in ("NFC", "NFD")]
    found = read(tmp_path, "c.csv", f"file,caption\n{mixed},which\na.mp4,red\n", [*forms, "a.mp4"])
    assert set(found.faults) == set(forms) and "only in their Unicode form" in found.faults[forms[0]][1]
    sub = tmp_path / "sub"
    sub.mkdir()
    for name in (*both, NFD[:-4] + ".txt"):
        (sub / name).write_text("a beetle")
    assert set(Folder(str(sub)).sidecars(both).texts) == {NFD}  # the other's caption is not taken


def test_names_in_a_table_are_of_the_folder_or_beside_the_table(tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    for name in ("a.mp4", "b.mp4", ".hidden.mp4"):
        (part / name).touch()
    (tmp_path / "other.mp4").touch()
    table = tmp_path / "all.csv"
    names = ["a.mp4", f"{tmp_path}/part/b.mp4", "part/.hidden.mp4", "other.mp4", "part\\gone.mp4"]
    table.write_text("file,caption\n" + "".join(f"{name},x\n" for name in names))
    found = read_captions(table, str(part), Names(Folder(str(part))))
    assert set(found.texts) == {"a.mp4", "b.mp4", ".hidden.mp4", "part/gone.mp4"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"UP.TXT": "text"}, "text"),
        ({"UP.json": '{"caption": "json"}', "UP.Txt": "text"}, "text"),
        ({"UP.MP4.txt": "whole name"}, "whole name"),
        ({"UP.txt": "", "UP.JSON": '["json"]'}, "json"),
        ({"UP.txt": "\n \n", "UP.MP4.json": '"json"'}, "json"),
        ({"UP.json": '{"caption": "", "text": "json"}'}, "json"),
        ({"UP.json": '\ufeff{"caption": "json"}'}, "json"),
        ({"UP.txt": b"\xff\xfet\x00e\x00x\x00t\x00"}, "text"),
        ({"UP.txt": b"caf\xe9"}, "bad_caption UP.txt, line 1 is not UTF-8"),
        ({"UP.txt": "a\0"}, "bad_caption UP.txt, line 1 has a NUL"),
        ({"UP.json": "{"}, "bad_caption UP.json is not JSON"),
        ({"UP.json": '{"a": "\\ud800"}'}, "no_caption UP.json has no caption: its keys are 'a', not captions, caption"),
        ({"UP.json": '{"text": "\\ud800"}'}, "bad_caption UP.json has a text that has half"),
        ({"UP.json": '{"caption": null, "text": []}'}, "no_caption UP.json has nothing in caption and text."),
        ({"UP.json": "5", "UP.txt": ""}, "no_caption UP.txt is empty. UP.json is 5, which is not a caption."),
        ({"UP.txt": "one", "UP.TXT": "two"}, "bad_caption 'UP.TXT' and 'UP.txt' cannot be told apart"),
        ({"UP.txt": "x" * ((16 << 20) + 1)}, "bad_caption UP.txt has 16777217 bytes"),
        ({"UP.txt": None}, "bad_caption UP.txt cannot be read (no such file)"),
    ],
)
def test_captions_beside_a_clip(tmp_path, files, wanted):
    (tmp_path / "UP.MP4").touch()
    for name, content in files.items():
        if content is None:
            (tmp_path / name).symlink_to(tmp_path / "nowhere")
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = Folder(str(tmp_path)).sidecars(["UP.MP4"])
    if "UP.MP4" in found.texts:
        assert found.texts == {"UP.MP4": [Caption(wanted)]} and not found.faults
    else:
        assert " ".join(found.faults["UP.MP4"]).startswith(wanted)


def test_a_scan_names_what_is_wrong_and_keeps_the_rest(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((4, 16, 16, 3), np.uint8), 8)
    for number, name in enumerate(("b.mp4", "c.mp4"), 1):
        write_video(tmp_path / name, np.full((4, 16, 16, 3), 80 * number, np.uint8), 8)
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.json").write_text('{"blurb": "x"}')
    result = scan(tmp_path, workers=1)
    assert [clip.path.rpartition("/")[2] for clip in result.manifest] == ["a.mp4"] and not result.ignored
    assert {s.file: s.reason for s in result.skipped} == {"b.mp4": "bad_caption", "c.mp4": "no_caption"}
    assert "b.txt" in result.skipped[0].message and "'blurb'" in result.skipped[1].message
    result = scan(tmp_path, uncaptioned=True, workers=1)
    assert len(result.manifest) == 3 and [s.file for s in result.damaged] == ["b.mp4"]
    result = scan(tmp_path, caption_column="blurb", workers=1)
    assert [clip.captions for clip in result.manifest] == [(Caption("fine"),), (Caption("x"),)]
    table = tmp_path / "t.jsonl"
    table.write_text('{"file": "a.mp4", "caption": "red"}\n{"caption": "whose"}\n{"file": "b.mp4", "caption": 5}\n')
    result = scan(tmp_path, table, workers=1)
    assert {s.file.rpartition("/")[2]: s.reason for s in result.skipped} == {
        "b.mp4": "bad_caption", "c.mp4": "no_caption", "t.jsonl, line 2": "bad_row"
    }  # fmt: skip


def test_a_table_names_a_member_of_a_tar_in_another_unicode_form(tmp_path):
    import tarfile

    write_video(tmp_path / "a.mp4", np.zeros((4, 16, 16, 3), np.uint8), 8)
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(tmp_path / "a.mp4", NFD)
    shutil.move(tmp_path / "a.mp4", tmp_path / "a.bin")
    (tmp_path / "captions.csv").write_text(f"file,caption\ns.tar/{NFC},a beetle\n")
    assert scan(tmp_path, workers=1).manifest[0].captions == (Caption("a beetle"),)
