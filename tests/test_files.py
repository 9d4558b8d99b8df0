from __future__ import annotations

import hashlib
import io
import os

import pytest

from stdit.errors import StditError
from stdit.files import journal, make_folder, publish, publish_folder, publish_text, sha256_of


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    publish_text(path, "old\r\n")
    with publish(path) as part:
        part.write_bytes(b"ne")
        assert path.read_bytes() == b"old\r\n" and part.parent == tmp_path and part.name.startswith(".")
        part.write_bytes(b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    publish_text(path, "old")
    with pytest.raises(type(error)), publish(path) as part:
        part.write_text("ne")
        raise error
    with pytest.raises(FileNotFoundError), publish(path):
        pass  # nothing was written
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a file system that makes no files")
@pytest.mark.parametrize(
    "make", [make_folder, lambda place: publish_text(place, ""), lambda place: journal(place).__enter__()]
)
@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y.txt"])
def test_a_place_where_nothing_can_be_made_is_named(make, place):
    with pytest.raises(StditError, match=r"/proc/x.*Choose another path"):
        make(place)


def test_what_a_library_would_say_of_a_place_that_is_none_is_the_systems_error(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file/a", "file/b/a"):
        with pytest.raises((FileExistsError, NotADirectoryError)), publish(tmp_path / place):
            raise RuntimeError("a library's own words")
    with publish(tmp_path / "new" / "er" / "a") as part:
        part.write_text("a")
    assert (tmp_path / "new" / "er" / "a").read_text() == "a"


def test_a_journal_keeps_every_line_that_was_not_cut_off(tmp_path):
    lines = [
        {"path": "a\udcff", "text": "é\u2028中"},
        {"path": "b"},
    ]  # a name that is not UTF-8, as the system gives it
    with journal(tmp_path / "new" / "j.jsonl") as (found, add):
        add(lines)
        assert found == []
    with (tmp_path / "new" / "j.jsonl").open("a") as file:
        file.write('7\n{"path": ')
    with journal(tmp_path / "new" / "j.jsonl") as (found, add):
        add([{"path": "c"}])
        assert found == lines
    with journal(tmp_path / "new" / "j.jsonl") as (found, _):
        assert found == [*lines, {"path": "c"}]


def test_a_folder_takes_the_place_of_the_old_one_with_nothing_of_it_left(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    (tmp_path / "part" / "vae").mkdir(parents=True)
    (tmp_path / "part" / "vae" / "new").write_text("new")
    publish_folder(tmp_path / "part", tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["vae"]
    assert (tmp_path / "model" / "vae" / "new").read_text() == "new"


def test_the_mode_is_that_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    publish_text(tmp_path / "published", "")
    assert (tmp_path / "published").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_journal_keeps_every_line_whatever_its_text(tmp_path):
    """Characters that end a line elsewhere do not in JSON; what was cut off is left out."""
    lines = [{"text": "one\u2028two\u2029\x85\x0b\x1c"}, {"text": "three\r\nfour"}]
    with journal(tmp_path / "j.jsonl") as (found, add):
        assert found == []
        add(lines)
    with open(tmp_path / "j.jsonl", "ab") as file:
        file.write(b'{"text": "cut')
    for _ in range(2):
        with journal(tmp_path / "j.jsonl") as (found, add):
            assert found == lines


def test_hash_of_more_than_a_block():
    content = bytes(range(256)) * 5000
    assert sha256_of(io.BytesIO(content)) == hashlib.sha256(content).hexdigest()
