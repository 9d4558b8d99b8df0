"""A command is never silent for long, and stdit as a library prints nothing."""

from __future__ import annotations

import pytest

from stdit import heartbeat
from stdit.heartbeat import counting_bar, named_bars, tracked


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests advance. The heartbeat's thread does not run; tests call `beat`."""
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heartbeat.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(heartbeat.threading.Thread, "join", lambda self: None)
    return now


def test_it_speaks_at_once_and_after_each_silence(clock, capsys):
    beats = heartbeat.Heartbeat()
    beats.start("stdit train")
    assert capsys.readouterr().err == "stdit train: starting …\n"
    beats.doing("loading weights")
    for _ in range(2):
        clock[0] += 9
        beats.beat()
        assert capsys.readouterr().err == ""
        clock[0] += 1
        beats.beat()
        assert "stdit train: loading weights" in capsys.readouterr().err
    clock[0] += 9
    beats.spoke()
    clock[0] += 9
    beats.beat()
    assert capsys.readouterr().err == ""
    with beats.muted():
        clock[0] += 60
        beats.beat()
    assert capsys.readouterr() == ("", "")


def test_ranks_but_the_first_and_libraries_are_silent(clock, capsys, monkeypatch):
    beats = heartbeat.Heartbeat()
    beats.doing("anything")
    monkeypatch.setenv("RANK", "1")
    beats.start("stdit train")
    beats.stop()
    assert beats._thread is None
    clock[0] += 100
    with beats.muted():
        pass
    assert capsys.readouterr() == ("", "")


def test_its_thread_ends_with_the_command():
    beats = heartbeat.Heartbeat()
    beats.start("stdit")
    thread = beats._thread
    assert thread is not None and thread.is_alive()
    beats.stop()
    assert not thread.is_alive()


def test_bars_without_a_terminal_say_how_far_they_are(clock, capsys, monkeypatch):
    beats = heartbeat.Heartbeat()
    monkeypatch.setattr("stdit.heartbeat.HEARTBEAT", beats)
    beats.start("stdit")
    capsys.readouterr()
    with counting_bar("probing") as (start, done):
        start(40)
        done(0)
        clock[0] += 10
        done(10)
        beats.beat()
        assert capsys.readouterr().err == "stdit: probing 10/40, 30 s left … 10 s\n"
        clock[0] += 1
        done(30)
    assert capsys.readouterr() == ("", "probing: 40 of 40 in 11 s\n")
    with named_bars(hidden=True) as progress:
        progress("steps", 1, 2)
        clock[0] += 10
        beats.beat()
        assert "steps 1/2" in capsys.readouterr().err
    assert capsys.readouterr() == ("", "")
    assert list(tracked([3, 1], "dealing")) == [3, 1]
    assert capsys.readouterr() == ("", "dealing: 2 of 2 in 0 s\n")
