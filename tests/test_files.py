from __future__ import annotations

import hashlib
import io
import os

import pytest

from stdit.files import publish, publish_folder, publish_text, sha256_of


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


def test_hash_of_more_than_a_block():
    content = bytes(range(256)) * 5000
    assert sha256_of(io.BytesIO(content)) == hashlib.sha256(content).hexdigest()
