"""One command at a time uses a folder, the error names the holder, and no lock outlives its process."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest
from children import Child

from stdit import locks
from stdit.errors import StditError
from stdit.files import make_folder
from stdit.locks import NAME, locked

HOLDS = """
import sys, time
from stdit.locks import locked
with locked(sys.argv[1], "a test", ""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder's lock."""
    child = Child([sys.executable, "-c", HOLDS, str(tmp_path)])
    end = time.monotonic() + 300
    while "held" not in child.output:
        assert child.popen.poll() is None and time.monotonic() < end, child.output
        time.sleep(0.05)
    yield child
    child.kill()


def test_another_process_is_refused_and_told_who_has_it(tmp_path, holder, monkeypatch, capsys):
    monkeypatch.setattr(locks, "WAIT", 0.2)
    doing = []
    monkeypatch.setattr(locks.HEARTBEAT, "doing", doing.append)
    linked = tmp_path / "link"
    linked.symlink_to(tmp_path)
    for place in (tmp_path, linked):
        with pytest.raises(StditError) as caught, locked(place, "a training", "Choose another run=PATH."):
            raise AssertionError("two are in")
        said = str(caught.value)
        assert f"a test (process {holder.popen.pid} on {socket.gethostname()}, since 20" in said
        assert said.startswith(f"{place}: is in use") and said.endswith("Choose another run=PATH.")
    assert "waiting 0.2 s for its end" in capsys.readouterr().err
    assert doing == [f"waiting for {place}" for place in (tmp_path, linked)]


def test_a_lock_ends_with_its_process(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 300.0)  # as long as the system takes to end a process
    os.kill(holder.popen.pid, 9)
    with locked(tmp_path, "a training", ""):
        assert str(os.getpid()) in (tmp_path / NAME).read_text()
    assert not (tmp_path / NAME).exists()
    with locked(tmp_path, "a training", "", keep=True):
        pass
    with locked(tmp_path, "a training", ""):  # a file that was kept holds nothing
        pass


def test_who_removed_the_file_of_a_machine_that_is_gone_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.0)
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    with locked(tmp_path, "a training", ""):
        monkeypatch.setattr(socket, "gethostname", lambda: "node8")
        with pytest.raises(StditError, match=rf"on node7.*if that machine is gone, remove .*{NAME}"):
            with locked(tmp_path, "a training", ""):
                raise AssertionError("two are in")
        (tmp_path / NAME).unlink()
        with locked(tmp_path, "a training", ""):
            assert "node8" in (tmp_path / NAME).read_text()


def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    import errno
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "new", "a training", ""):
        assert (tmp_path / "new").is_dir()
    assert "this disk has no file locks" in capsys.readouterr().err


def test_a_child_of_the_holder_holds_nothing(tmp_path, monkeypatch):
    """A decoding process that outlives a killed training must not keep its lock."""
    monkeypatch.setattr(locks, "WAIT", 0.0)
    with locked(tmp_path, "a training", "", keep=True):
        child = Child([sys.executable, "-c", "import time; time.sleep(600)"])
    with locked(Path(tmp_path), "a training", ""):
        assert child.popen.poll() is None
    child.kill()


def test_a_folder_that_its_last_holder_removed_is_made_again(tmp_path, monkeypatch):
    calls = []

    def make(folder):
        calls.append(folder)
        return Path(folder) if len(calls) == 1 else make_folder(folder)  # removed before the first lock

    monkeypatch.setattr(locks, "make_folder", make)
    with locked(tmp_path / "out", "a conversion", ""):
        assert (tmp_path / "out" / NAME).is_file()
    assert len(calls) == 2
