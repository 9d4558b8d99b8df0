"""A rank that dies, hangs or fails ends all others soon, and they name it: real processes under real signals."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import pytest
from rank_children import start_ranks

from stdit.errors import StditError
from stdit.training.engine.parallel import TIMEOUT, World
from stdit.training.watch import watched

WORKER = Path(__file__).with_name("watch_worker.py")
SOON = 120.0  # seconds; it takes 4, on a machine that has time


@pytest.mark.parametrize(
    ("number", "rank", "minutes", "said"),
    [
        (signal.SIGKILL, 2, TIMEOUT, r"error: rank 2 has died \(step \d+\)"),
        (signal.SIGKILL, 0, TIMEOUT, r"error: rank 0 has died \(step \d+\)"),
        (signal.SIGSTOP, 1, 0.2, r"error: rank 1 has not answered for \d+ s \(step \d+\)"),
        (signal.SIGSTOP, 0, 0.2, r"error: rank 0 has not answered for \d+ s \(step \d+\)"),
    ],
)
def test_a_rank_that_is_killed_or_stopped(number: signal.Signals, rank: int, minutes: float, said: str) -> None:
    ranks = start_ranks([sys.executable, str(WORKER), str(minutes), "-1"], 3)
    deadline = time.monotonic() + 600
    while not all("under way" in child.output for child in ranks):
        assert time.monotonic() < deadline and all(child.popen.poll() is None for child in ranks)
        time.sleep(0.05)
    ranks[rank].popen.send_signal(number)
    for other, child in enumerate(ranks):
        assert child.status(SOON) == (-signal.SIGKILL if other == rank else 1), child.output  # a stopped one is ended
        assert other == rank or re.search(said, child.output), child.output
        assert "Traceback" not in child.output or other == rank


def test_a_rank_that_fails_is_named_by_the_others() -> None:
    command = [sys.executable, str(WORKER), str(TIMEOUT)]
    ranks = start_ranks(command, 2, lambda rank: ["9" if rank == 1 else "-1"])
    first, second = ranks
    assert first.status(600) == 1 and "error: rank 1 stopped (step 9): RuntimeError: a bug of ours" in first.output
    assert second.status(SOON) == 1 and "Traceback" in second.output  # it shows where


def test_one_rank_alone_is_not_watched() -> None:
    import torch

    with pytest.raises(StditError, match="as it was"), watched(World(0, 1, torch.device("cpu")), 1):
        raise StditError("as it was")
