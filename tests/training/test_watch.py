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
    ("number", "minutes", "said"),
    [
        (signal.SIGKILL, TIMEOUT, r"error: rank {rank} has died \(step \d+\)"),
        (signal.SIGSTOP, 0.2, r"error: rank {rank} has not answered for \d+ s \(step \d+\)"),
    ],
)
def test_a_rank_that_is_killed_or_stopped(number: signal.Signals, minutes: float, said: str) -> None:
    """Rank 0, which hears all others, and another one: of two groups of three, which run together."""
    command = [sys.executable, str(WORKER), str(minutes), "-1"]
    groups = {rank: start_ranks(command, 3) for rank in (0, 2)}
    deadline = time.monotonic() + 600
    for ranks in groups.values():
        while not all("under way" in child.output for child in ranks):
            assert time.monotonic() < deadline and all(child.popen.poll() is None for child in ranks)
            time.sleep(0.05)
    for rank, ranks in groups.items():
        ranks[rank].popen.send_signal(number)
    for rank, ranks in groups.items():
        for other, child in enumerate(ranks):
            assert child.status(SOON) == (-signal.SIGKILL if other == rank else 1), (
                child.output
            )  # a stopped one is ended
            assert other == rank or re.search(said.format(rank=rank), child.output), child.output
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
