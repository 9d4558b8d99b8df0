"""Two ranks of a real training: signals, deaths, hangs and numbers that are not finite, on one of them.

test_watch.py tries deaths and hangs of ranks that train nothing.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import pytest
from children import Child
from rank_children import start_ranks
from tiny_runs import losses

from stdit.evaluation.report import read_metrics
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.watch import BEAT

pytest.importorskip("deepspeed")
WORKER = Path(__file__).with_name("survival_worker.py")
LIMIT = 600.0


def start(tiny: Path, folder: Path, *overrides: str) -> list[Child]:
    settings = [f"run={folder}", "parallel.deepspeed=zero1", "schedule.steps=100000", "schedule.decay=constant"]
    settings += ["plan.tokens_per_pack=100", "checkpoint.every=1000000"]
    return start_ranks([sys.executable, str(WORKER), str(tiny / "flow.yaml"), *settings, *overrides], 2)


def wait_for_step(folder: Path, ranks: list[Child], step: int) -> None:
    deadline = time.monotonic() + LIMIT
    while max(losses(folder), default=0) < step:
        assert time.monotonic() < deadline, [child.output for child in ranks]
        for child in ranks:
            assert child.popen.poll() is None, child.output
        time.sleep(0.05)


def no_process_is_left(ranks: list[Child], limit: float = 30.0) -> None:
    """None of a rank's session, its decoders among them."""
    deadline = time.monotonic() + limit
    while left := [child for child in ranks if _session(child.popen.pid)]:
        assert time.monotonic() < deadline, [_session(child.popen.pid) for child in left]
        time.sleep(0.1)


def _session(leader: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def survives_a_signal(tiny: Path, folder: Path, number: signal.Signals, rank: int) -> None:
    ranks = start(tiny, folder)
    wait_for_step(folder, ranks, 3)
    ranks[rank].popen.send_signal(number)
    sent = time.monotonic()
    for child in ranks:
        assert child.status(LIMIT) == 75, child.output
    print(f"saved and ended {time.monotonic() - sent:.1f} s after rank {rank} got {number.name}")
    no_process_is_left(ranks)
    saved = Checkpoint.latest(folder)
    assert saved is not None and saved.step == max(losses(folder))
    assert f"saved after step {saved.step}" in ranks[0].output
    ranks = start(tiny, folder, f"schedule.steps={saved.step + 1}")  # all of its shards are of that step
    for child in ranks:
        assert child.status(LIMIT) == 0, child.output
    assert list(losses(folder)) == list(range(1, saved.step + 2))


def survives_a_death(tiny: Path, folder: Path, rank: int) -> None:
    ranks = start(tiny, folder)
    wait_for_step(folder, ranks, 3)
    time.sleep(3 * BEAT)  # what a rank does is known as of its last message
    ranks[rank].popen.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert ranks[1 - rank].status(LIMIT) == 1, ranks[1 - rank].output
    print(f"ended {time.monotonic() - killed:.1f} s after rank {rank} was killed")
    assert re.search(rf"error: rank {rank} has died \(step \d+/100000\)", ranks[1 - rank].output)
    assert "Traceback" not in ranks[1 - rank].output
    no_process_is_left(ranks)


def survives_a_hang(tiny: Path, folder: Path, rank: int) -> None:
    ranks = start(tiny, folder, "parallel.timeout=0.5")
    wait_for_step(folder, ranks, 3)
    time.sleep(3 * BEAT)
    ranks[rank].popen.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert ranks[1 - rank].status(LIMIT) == 1, ranks[1 - rank].output
    print(f"ended {time.monotonic() - stopped:.1f} s after rank {rank} was stopped, where 30 s without an answer count")
    said = rf"error: rank {rank} has not answered for \d+ s \(step \d+/100000\)"
    assert re.search(said, ranks[1 - rank].output), ranks[1 - rank].output
    assert ranks[rank].status(LIMIT) == -signal.SIGKILL
    no_process_is_left(ranks)


def survives_nan(tiny: Path, folder: Path, rank: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps in a row, after step `first`, update nothing and name the rank's clips; three end the run where two are
    allowed."""
    monkeypatch.setenv("STDIT_NAN", f"{rank}:{first}:2")
    ranks = start(tiny, folder, f"schedule.steps={first + 4}", "optimizer.max_skipped_steps=2")
    for child in ranks:
        assert child.status(LIMIT) == 0, child.output
    no_process_is_left(ranks)
    skipped = read_metrics(folder, "skipped")
    assert [line["step"] for line in skipped] == [first + 1, first + 2] and [x["in_a_row"] for x in skipped] == [1, 2]
    assert all(line["clips"] and {clip["rank"] for clip in line["clips"]} == {rank} for line in skipped)
    found = losses(folder)
    assert [step for step, loss in found.items() if loss is None] == [first + 1, first + 2]
    monkeypatch.setenv("STDIT_NAN", f"{rank}:{first}:3")
    ranks = start(tiny, folder.with_name(f"{folder.name}-stops"), "optimizer.max_skipped_steps=2")
    for child in ranks:
        assert child.status(LIMIT) == 1 and "3 steps in a row: stopped" in child.output, child.output
    monkeypatch.delenv("STDIT_NAN")
    no_process_is_left(ranks)


def survives_an_old_listing(tiny: Path, folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """folder: of a run with checkpoints, of which one rank does not see the newest: all ranks end and say so."""
    monkeypatch.setenv("STDIT_OLDER", str(rank))
    newest = Checkpoint.latest(folder)
    assert newest is not None
    ranks = start(tiny, folder, f"schedule.steps={newest.step + 1}")
    begun = time.monotonic()
    for child in ranks:
        assert child.status(LIMIT) == 1 and "Traceback" not in child.output, child.output
    print(f"ended {time.monotonic() - begun:.1f} s after the start, where rank {rank} had an old listing")
    said = r"error: .*rank 0 \(on .*\) sees \S+ and rank 1 \(on .*\) sees \S+ as the newest checkpoint"
    assert all(re.search(said, child.output) for child in ranks), [child.output for child in ranks]
    monkeypatch.delenv("STDIT_OLDER")
    no_process_is_left(ranks)
    again = Checkpoint.latest(folder)
    assert again is not None and again.sha256 == newest.sha256


def test_a_signal_to_one_rank_saves_the_same_step_on_both(tiny: Path, tmp_path: Path) -> None:
    survives_a_signal(tiny, tmp_path / "run", signal.SIGTERM, 1)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(20))
def test_all_of_it_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int) -> None:
    """With -s it says how long each took."""
    rank = turn % 2
    survives_a_signal(tiny, tmp_path / "signal", signal.SIGTERM, rank)
    survives_an_old_listing(tiny, tmp_path / "signal", rank, monkeypatch)
    survives_a_death(tiny, tmp_path / "death", rank)
    survives_a_hang(tiny, tmp_path / "hang", rank)
    survives_nan(tiny, tmp_path / "nan", rank, 1 + turn // 2, monkeypatch)
    if turn < 2:
        survives_a_signal(tiny, tmp_path / "requeue", signal.SIGUSR1, rank)
