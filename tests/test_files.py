from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from children import Child

from stdit import files
from stdit.errors import StditError
from stdit.files import (
    check_copyable,
    copy_folder,
    disk_trouble,
    journal,
    local_file,
    local_folder,
    make_folder,
    publish,
    publish_folder,
    publish_text,
    sha256_of,
    within,
)


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
    """Characters that end lines elsewhere do not in JSON; a line that was cut off is skipped."""
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


def test_a_copied_folder_is_ones_own_whatever_the_sources_permissions_are(tmp_path):
    source = tmp_path / "blobs"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "weights").write_bytes(b"weights")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "file").symlink_to("../blobs/deep/weights")
    (snapshot / "folder").symlink_to("../blobs/deep")
    for place in (source / "deep" / "weights", source / "deep", source, snapshot):
        place.chmod(0o555 if place.is_dir() else 0o444)
    copy_folder(snapshot, tmp_path / "copy")
    for place in (tmp_path / "copy").rglob("*"):
        assert place.stat().st_mode & 0o200 and not place.is_symlink()
    assert (tmp_path / "copy" / "folder" / "weights").read_bytes() == b"weights"
    (tmp_path / "copy" / "file").write_bytes(b"other")
    assert (source / "deep" / "weights").read_bytes() == b"weights"


AS_A_USER = """
import os, sys
from pathlib import Path
from stdit.files import copy_folder, publish_folder, remove_folder
here = Path(sys.argv[1])
try:
    (here / "source" / "new").touch()
except PermissionError:
    print("bound by permissions")
copy_folder(here / "source", here / "part")
publish_folder(here / "part", here / "model")
remove_folder(here / "left")
print(sorted(os.listdir(here)))
"""


def test_read_only_files_and_leftovers_are_in_no_users_way(tmp_path):
    drop = []
    if os.geteuid() == 0:  # root passes over permissions unless it gives that right up
        if not shutil.which("setpriv"):
            pytest.skip("run as an ordinary user, or with setpriv")
        rights = "-dac_override,-dac_read_search,-fowner"
        drop = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    for name in ("source", "left", "model"):
        (tmp_path / name / "deep" / "er").mkdir(parents=True)
        (tmp_path / name / "deep" / "er" / "file").write_text(name)
    read_only = [*(tmp_path / "source").rglob("*"), tmp_path / "source", *(tmp_path / "left").rglob("*")]
    for place in [*read_only, *(tmp_path / "model").rglob("*")]:
        place.chmod(0o555 if place.is_dir() else 0o444)
    said = Child([*drop, sys.executable, "-c", AS_A_USER, str(tmp_path)]).finish()
    assert said.splitlines() == ["bound by permissions", "['model', 'source']"]
    assert (tmp_path / "model" / "deep" / "er" / "file").read_text() == "source"


def test_what_cannot_be_copied_is_named_before(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "weights").symlink_to("../../blobs/none")
    with pytest.raises(StditError, match=r"in/deep/weights: is a link to \.\./\.\./blobs/none, which is not there"):
        check_copyable(tmp_path / "in")
    (tmp_path / "in" / "deep" / "weights").unlink()
    check_copyable(tmp_path / "in")
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")
    with pytest.raises(StditError, match=r"deep/up: is a link to its own parent"):
        check_copyable(tmp_path / "in")
    (tmp_path / "in" / "deep" / "up").unlink()
    os.mkfifo(tmp_path / "in" / "pipe")
    with pytest.raises(StditError, match="pipe: is not a file"):
        check_copyable(tmp_path / "in")


@pytest.mark.parametrize("exchanged", [True, False])
def test_there_is_always_the_old_folder_or_the_new_one(tmp_path, monkeypatch, exchanged):
    """The folder is whole after a kill at any step, once it is healed."""
    if not exchanged:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    elif not files._exchange(tmp_path, tmp_path):
        pytest.skip("no system that exchanges two names")

    class Killed(BaseException):
        pass

    def fresh() -> None:
        for name in os.listdir(tmp_path):
            shutil.rmtree(tmp_path / name)
        for name in ("model", "part"):
            (tmp_path / name).mkdir()
            for number in "012":
                (tmp_path / name / number).write_text(name)

    seen = set()
    for step in range(1, 30):
        fresh()
        left = step

        def count(real):
            def counted(*args, **options):
                nonlocal left
                left -= 1
                if exchanged:
                    assert (tmp_path / "model").exists()
                if not left:
                    raise Killed
                return real(*args, **options)

            return counted

        with pytest.MonkeyPatch.context() as patch:
            steps = [(files, "sync"), (files, "_exchange"), (Path, "rename"), (os, "unlink"), (os, "rmdir")]
            for module, name in steps:
                patch.setattr(module, name, count(getattr(module, name)))
            with suppress(Killed):
                publish_folder(tmp_path / "part", tmp_path / "model")
        files.heal_folder(tmp_path / "model")
        found = {(tmp_path / "model" / number).read_text() for number in "012"}
        assert len(found) == 1
        seen |= found
        if left > 0:
            break
    assert seen == {"model", "part"} and left > 0
    publish_folder(tmp_path / "model", tmp_path / "again")  # a name that is new
    assert os.listdir(tmp_path) == ["again"]


def test_a_link_gives_way_to_the_folder_and_what_it_led_to_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / "model").symlink_to("elsewhere")
    (tmp_path / "part").mkdir()
    publish_folder(tmp_path / "part", tmp_path / "model")
    assert not (tmp_path / "model").is_symlink() and (tmp_path / "elsewhere" / "mine").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "model"]


def test_a_file_that_shares_its_content_with_another_never_changes_that(tmp_path):
    (tmp_path / "input").write_text("input")
    os.link(tmp_path / "input", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("input")
    for name in ("hard", "soft"):
        publish_text(tmp_path / name, "output")
        assert (tmp_path / name).read_text() == "output" and (tmp_path / "input").read_text() == "input"


def test_a_path_lies_in_a_folder_however_the_two_are_written(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path / "a")
    assert within(".", tmp_path / "link") and within("b/new/er", "../link") and within(tmp_path / "link" / "b", "b/..")
    assert not within("..", ".") and not within(tmp_path / "ab", tmp_path / "a") and not within("new", "nowhere")


FULL = [
    (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
    (OSError(errno.EFBIG, "File too large"), "larger than disk"),
    (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
    (OSError(errno.EMFILE, "Too many open files"), "too many open files. Raise `ulimit -n`"),
    (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
    (shutil.Error([("a", "b", "[Errno 28] No space left on device"), ("c", "d", "[Errno 28] No…")]), "no space left"),
]


@pytest.mark.parametrize(("error", "says"), FULL)
def test_a_full_disk_and_limits_are_one_sentence_with_one_path(tmp_path, error, says):
    publish_text(tmp_path / "a", "old")
    with pytest.raises(StditError, match=rf"^\S*/a: {says}") as caught, publish(tmp_path / "a") as part:
        part.write_text("ne")
        raise error
    assert str(caught.value).count(str(tmp_path)) == 1 and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("our bug"), FileNotFoundError(errno.ENOENT, "none", "x"), OSError("odd")):
        assert disk_trouble(error) == ""
        with pytest.raises(type(error)) as caught, publish(tmp_path / "a") as part:
            part.touch()
            raise error
        assert caught.value is error


def test_a_journal_says_where_the_limit_is_and_keeps_what_was_written(tmp_path):
    """`ulimit -f` stands for a disk that is full after part of a line."""
    code = f"""
import resource
from stdit.files import journal
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
with journal({str(tmp_path / "j.jsonl")!r}) as (_, add):
    for number in range(1000):
        add([{{"number": number, "text": "x" * 50}}])
"""
    child = Child([sys.executable, "-c", code])
    assert child.status() == 1 and f"{tmp_path / 'j.jsonl'}: larger than disk or `ulimit -f` allow" in child.output
    assert (tmp_path / "j.jsonl").stat().st_size == 20000  # to the brim
    with journal(tmp_path / "j.jsonl") as (lines, add):
        add([{"number": -1}])
    with journal(tmp_path / "j.jsonl") as (again, _):
        assert [line["number"] for line in again] == [*range(len(lines)), -1] and len(lines) > 100


def test_a_name_as_long_as_names_can_be(tmp_path):
    for name in ("n" * 255, "é" * 127, "中" * 85):
        publish_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    with pytest.raises(OSError, match="too long"), publish(tmp_path / ("n" * 256)):
        raise AssertionError("the work has begun")


def test_places_that_cannot_be_written_to_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("nowhere")
    assert local_folder("--out", "~/new/er") == tmp_path / "home" / "new" / "er"
    assert (
        local_file("--out", "file") == Path("file") and local_folder("--out", f"file://{tmp_path}/a") == tmp_path / "a"
    )
    for wrong, said in [
        ("", "must be a path"),
        (" ", "must be a path"),
        ("s3://b/k", "a URL"),
        ("memory://k", "a URL"),
    ]:
        for check in (local_folder, local_file):
            with pytest.raises(StditError, match=f"^--out is {wrong and ''}.*{said}"):
                check("--out", wrong)
    for check, wrong, said in [
        (local_folder, "file", "file: is a file, not a folder"),
        (local_folder, "file/deep/er", "file: is a file, not a folder"),
        (local_file, "file/a.png", "file: is a file, not a folder"),
        (local_file, ".", "a folder. Name the file"),
        (local_folder, "gone/model", "gone: is a link to nowhere"),
    ]:
        with pytest.raises(StditError, match=said):
            check("--out", wrong)
    assert sorted(os.listdir(tmp_path)) == ["file", "gone"]  # nothing was made
