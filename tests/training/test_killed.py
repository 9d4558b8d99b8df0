"""Twenty real kills of a training, some of them while the background writer runs: not a bit differs at the end."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import half_written
from children import LIMIT, Child
from tiny_runs import ALONE, losses, make_quick

from stdit.training.config import load_config
from stdit.training.engine.checkpoint import published, step_of
from stdit.training.run import run

ROOT = Path(__file__).parents[2]
KILLS, STEPS = 20, 200


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = [f"schedule.steps={STEPS}", "checkpoint.every=1", "data.workers=0"]
    folder, whole = tmp_path / "run", tmp_path / "whole"
    command = [sys.executable, str(ROOT / "train.py"), str(tiny / "flow.yaml"), f"run={folder}", *settings]
    writing = 0
    for number in range(KILLS):
        before = step_of(found[-1]) if (found := published(folder)) else 0
        child = Child(command, os.environ | {"OMP_NUM_THREADS": "1"})
        end = time.monotonic() + LIMIT
        while not (found := published(folder)) or step_of(found[-1]) <= before:
            assert child.popen.poll() is None and time.monotonic() < end, child.output
            time.sleep(0.005)
        time.sleep(random.random() * 0.2)
        half: list[Path] = []
        while number % 4 == 0 and not half and child.popen.poll() is None:  # while it writes
            half = half_written(folder)
        child.kill()
        assert child.status() == -signal.SIGKILL, f"it ended before it could be killed: {child.output}"
        writing += bool(half)
        assert "refused" not in child.output
    assert writing >= 2
    for place in (folder, whole):
        run(load_config(tiny / "flow.yaml", [f"run={place}", *settings]), ALONE)
    assert losses(folder) == losses(whole) and len(losses(whole)) == STEPS
    ends = [published(place)[-1] / "rank-00000.safetensors" for place in (folder, whole)]
    assert all(end.parent.name == f"step-{STEPS:08d}" for end in ends)
    assert ends[0].read_bytes() == ends[1].read_bytes()
    torch.set_num_threads(threads)
