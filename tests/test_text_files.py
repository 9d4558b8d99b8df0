"""Encodings, line ends, odd characters, and tables with bad rows."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.errors import StditError
from stdit.text_files import csv_rows, decode_text, json_lines, json_rows, read_lines, read_text, read_yaml, split_lines

# what str.splitlines ends a line at, besides \n and \r\n
SEPARATORS = ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\x1d", "\x1e"]


def rows_of(path, text, is_row=lambda _: False):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    header, rows = csv_rows(path, lambda names: len(names) > 1, is_row)
    return header, list(rows)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_line_ends_at_line_feeds_alone(tmp_path, separator):
    text = f"first{separator}half"
    assert split_lines(f"{text}\r\nsecond\n", "a text") == [text, "second", ""]
    (tmp_path / "p.txt").write_bytes(f"{text}\nsecond\n".encode())
    assert read_lines(tmp_path / "p.txt") == [text, "second"]
    (tmp_path / "t.jsonl").write_bytes((json.dumps({"a": text}, ensure_ascii=False) + "\n").encode())
    assert [row.values for row in json_rows(tmp_path / "t.jsonl")] == [{"a": text}]
    assert rows_of(tmp_path / "t.csv", f"a,b\n1,{text}\n")[1] == [(2, {"a": "1", "b": text}, "")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark_are_read_and_others_named(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("ein Käfer\r\n象\r\n".encode(encoding))
    assert read_lines(tmp_path / "a.txt") == ["ein Käfer", "象"]
    header, rows = rows_of(tmp_path / "t.csv", 'a;b\r\n1;"Käfer; 象"\r\n'.encode(encoding))
    assert header == ["a", "b"] and [row.values for row in rows] == [{"a": "1", "b": "Käfer; 象"}]
    with pytest.raises(StditError, match=r"x\.txt is UTF-16 or UTF-32 without a byte order mark"):
        decode_text("a dog".encode("utf-16-le"), "x.txt")
    with pytest.raises(StditError, match=r"x\.txt is not UTF-16"):
        decode_text(b"\xff\xfea\x00\x00\xd8", "x.txt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"fine\ncaf\xe9\n", r"line 2 is not UTF-8 \(byte 0xe9 after 'caf'\)"),
        (b"fine\n\xed\xa0\xbd\n", "line 2 is not UTF-8"),
        (b"a\x00b\n" + b"x" * 9, "line 1 has a NUL"),
        (b"one\rtwo\rthree", "lines end in CR alone"),
    ],
)
def test_what_a_file_of_lines_may_not_hold_is_named(tmp_path, content, says):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(StditError, match=says) as error:
        read_lines(tmp_path / "p.txt")
    assert "p.txt" in str(error.value)


def test_a_bad_line_of_jsonl_is_a_row_with_its_fault(tmp_path):
    lines = ['\ufeff{"a": 1}', "", "[1, 2]", '{"a": ', "[" * 100_000, '{"a": ' + "1" * 5000 + "}", '\ufeff{"a": 2}']
    (tmp_path / "t.jsonl").write_text("\r\n".join(lines))
    rows = list(json_rows(tmp_path / "t.jsonl"))
    assert [(row.line, row.values) for row in rows] == [
        (1, {"a": 1}),
        (3, {}),
        (4, {}),
        (5, {}),
        (6, {}),
        (7, {"a": 2}),
    ]
    assert "not an object" in rows[1].fault and all("is not JSON" in row.fault for row in rows[2:5])
    with pytest.raises(StditError, match=r"t\.jsonl, line 3 is \[1, 2\]"):
        list(json_lines(tmp_path / "t.jsonl"))


cell = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=12)


@settings(max_examples=100, deadline=None)
@given(table=st.lists(st.tuples(cell, cell), max_size=5), delimiter=st.sampled_from(",;\t"))
def test_what_a_csv_writer_wrote_is_read_back(tmp_path_factory, table, delimiter):
    """Texts with line ends, quotation marks and delimiters, as Python's own writer quotes them."""
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *table])
    _, rows = rows_of(tmp_path_factory.mktemp("csv") / "t.csv", out.getvalue())
    there = [one for one in table if any(text.strip() for text in one)]  # empty rows are left out

    def lines(text):  # a line end in a text is read as \n
        return text.replace("\r\n", "\n")

    assert [(lines(row.values["a"]), lines(row.values["b"])) for row in rows] == [
        (lines(a), lines(b)) for a, b in there
    ]
    assert not any(row.fault for row in rows)


def test_rows_of_odd_lengths_and_marks_are_named_and_the_others_read(tmp_path):
    text = 'sep=;\nfile ; Caption\na;red\nb\nc;red;left\nd;"red" ball\n;;\n\ne; "red; left"\nf;x\0y\ng;blue;;\n'
    header, rows = rows_of(tmp_path / "t.csv", text)
    assert header == ["file", "Caption"]
    assert [(row.line, row.values.get("Caption")) for row in rows] == [
        (3, "red"), (4, None), (5, "red"), (6, "red ball"), (9, "red; left"), (10, "x\0y"), (11, "blue")
    ]  # fmt: skip
    faults = {row.line: row.fault for row in rows if row.fault}
    assert {line: fault.split(" (")[0].split(":")[0] for line, fault in faults.items()} == {
        4: "has fewer fields than the first line",
        5: "has more fields than the first line",
        6: "has a quotation mark inside a field",
    }


def test_a_field_may_have_any_length(tmp_path):
    _, rows = rows_of(tmp_path / "t.csv", 'a,b\n1,"' + "x\n" * 200_000 + '"\n2,y\n')
    assert len(rows[0].values["b"]) == 400_000 and rows[1].values == {"a": "2", "b": "y"} and rows[1].line == 200_003


@pytest.mark.parametrize(
    "rest",
    [
        "2,blue\n3,green\n",  # to the end of the file
        '2,"blue"\n3,green\n',  # to the next mark, after which the text goes on
        '2,a disk of 5"\n3,green\n',  # to a mark that ends a field: what it holds looks like rows
        '2,"",x\n3,green\n',
    ],
)
def test_a_quotation_mark_that_is_not_closed_is_named_with_its_line(tmp_path, rest):
    def is_row(row):
        return row.get("a") in ("1", "2", "3")

    with pytest.raises(StditError, match=r"t\.csv, line 2: a quotation mark opens a field"):
        rows_of(tmp_path / "t.csv", f'a,b\n1,"red\n{rest}', is_row)
    _, rows = rows_of(tmp_path / "t.csv", 'a,b\n1,"red\n4, to be continued\n"\n2,blue\n', is_row)
    assert [row.values["b"] for row in rows] == ["red\n4, to be continued\n", "blue"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {b: 1, c: 2, b: 3}", "b is set twice"),
        ("a: 2024-13-45", "month"),
        ("a: " + "[" * 100_000, "recursion"),
        ("a: " + "1" * 5000, "digits"),
        ("a: [", "flow node"),
    ],
)
def test_yaml_that_cannot_be_is_one_error(text, says):
    with pytest.raises(StditError, match=f"c.yaml is not YAML.*(?s:.*){says}"):
        read_yaml(text, "c.yaml is")


def test_yaml_merges_and_anchors_stay(tmp_path):
    (tmp_path / "c.yaml").write_bytes("a: &a {b: 1}\nc: {<<: *a, d: é}\n".encode("utf-16"))
    assert read_yaml(read_text(tmp_path / "c.yaml"), "") == {"a": {"b": 1}, "c": {"b": 1, "d": "é"}}
