"""Saving: the steps go on meanwhile, errors reach every rank, and whatever is cut off, the newest whole checkpoint
stands."""

from __future__ import annotations

import errno
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save
from children import Child
from faulty_disk import FaultyDisk, PowerCut
from thread_world import ThreadWorld
from torch import nn

from stdit.errors import StditError
from stdit.training.engine import saver as saver_module
from stdit.training.engine.agreement import agree
from stdit.training.engine.checkpoint import Checkpoint, CheckpointConfig, published, remove_strays
from stdit.training.engine.engine import Engine, ShardPiece, TorchEngine
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.engine.parallel import World
from stdit.training.engine.saver import Saver

ALONE = World(0, 1, torch.device("cpu"))
WORKER = Path(__file__).with_name("checkpoint_worker.py")


def engine_at(step: int) -> TorchEngine:
    """An engine whose weights are the step's number."""
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(step)
    return TorchEngine(module, OptimizerConfig(), "fp32", ALONE)


class HalfEngine(Engine):
    """One rank's half of a parameter of four numbers."""

    def __init__(self, rank: int, value: float) -> None:
        self.flat_masters = [nn.Parameter(torch.full((2,), value))]
        self.pieces = [[ShardPiece("weight", (4,), 2 * rank, 0, 2)]]
        self.optimizer = torch.optim.SGD(self.flat_masters)


def two_ranks(work: Callable[[World], Any]) -> list[BaseException | None]:
    """What the ranks end in."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work, ThreadWorld(rank, 2, torch.device("cpu"))) for rank in range(2)]
        return [job.exception(60) for job in jobs]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writers wait until it is set."""
    opened, real = threading.Event(), saver_module.tensor_bytes

    def wait(*arguments: Any) -> Any:
        assert opened.wait(60)
        return real(*arguments)

    monkeypatch.setattr(saver_module, "tensor_bytes", wait)
    yield opened
    opened.set()


def test_the_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, gate: threading.Event) -> None:
    engine, saver, state = engine_at(1), Saver(tmp_path, CheckpointConfig(), ALONE), {"failures": {"a": 1}}
    assert not saver.is_ready
    saver.start(1, [engine], state)
    with torch.no_grad():  # the next step
        for flat in engine.flat_masters:
            flat.fill_(2)
    state["failures"]["b"] = 2
    assert not saver.is_ready and not published(tmp_path)
    gate.set()
    while saver.is_ready or not published(tmp_path):  # as `accumulate` does in every step
        if saver.is_ready:
            saver.go_on()
    found = Checkpoint.latest(tmp_path)
    assert found is not None and found.state == {"failures": {"a": 1}}
    assert all((weight == 1).all() for weight in found.weights().values())
    saver.start(2, [engine], {})
    with torch.no_grad():
        for flat in engine.flat_masters:
            flat.fill_(3)
    saver.start(3, [engine], {})  # waits for the other
    assert [path.name for path in published(tmp_path)] == ["step-00000001", "step-00000002"]
    saver.finish()
    for step, path in enumerate(published(tmp_path), 2):
        assert all((weight == step).all() for weight in Checkpoint(path).weights().values())


def test_without_background_nothing_is_copied_and_the_checkpoint_is_there(tmp_path: Path) -> None:
    engine, saver = engine_at(1), Saver(tmp_path, CheckpointConfig(background=False), ALONE)
    flats = {flat.data_ptr() for flat in engine.flat_masters}
    assert {tensor.data_ptr() for tensor in saver._snapshot([engine]).tensors.values()} == flats
    saver.start(1, [engine], {})
    assert len(published(tmp_path)) == 1 and not saver.is_ready


@pytest.mark.parametrize("where", ["tensor_bytes", "checksum", "publish_folder"])
def test_a_full_disk_is_said_and_the_earlier_checkpoint_stays(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, [engine_at(1)], ALONE)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saver_module, where, full)
        with pytest.raises(StditError, match=r"no space left on the disk.*earlier ones in \S+ are kept"):
            save(tmp_path, 2, [engine_at(2)], ALONE)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    found = agree(tmp_path, ALONE, print)
    assert found is not None and found.step == 1


def test_one_ranks_full_disk_stops_all_in_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, steps = Saver._write_shard, dict.fromkeys(range(2), 0)

    def full(self: Saver, *arguments: Any) -> Any:
        if self.world.rank == 1 and ".tmp-step-00000002" in str(arguments[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    monkeypatch.setattr(Saver, "_write_shard", full)

    def train(world: World) -> None:
        saver = Saver(tmp_path, CheckpointConfig(), world)
        saver.start(1, [HalfEngine(world.rank, 1.0)], {})
        for _ in range(1000):
            steps[world.rank] += 1
            if world.sum_(torch.tensor(float(saver.is_ready))) == 2:
                saver.go_on()
            elif saver._write is None:
                saver.start(2, [HalfEngine(world.rank, 2.0)], {})

    errors = two_ranks(train)
    assert steps[0] == steps[1] < 1000
    assert all(isinstance(error, StditError) and "no space left" in str(error).lower() for error in errors), errors
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert torch.equal(Checkpoint(published(tmp_path)[0]).weights()["weight"], torch.ones(4))


def test_machines_that_do_not_share_the_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "LAG", 0.0)

    def work(world: World) -> None:
        save(tmp_path / f"disk {world.rank}", 3, [HalfEngine(world.rank, 1.0)], world)

    errors = two_ranks(work)
    said = (
        r"disk 0/checkpoints/\.tmp-step-00000003/rank-00001\.safetensors: rank 1 wrote it, and rank 0 does not see it"
    )
    for error in errors:
        with pytest.raises(StditError, match=said):
            raise error or AssertionError
    assert not published(tmp_path / "disk 0")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_power_cut_at_any_operation_leaves_the_newest_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """damaged: a checkpoint of this step is there already, was refused, and is replaced."""
    (tmp_path / "before").mkdir()
    save(tmp_path / "before" / "run", 1, [engine_at(1)], ALONE)
    if damaged:
        (save(tmp_path / "before" / "run", 2, [engine_at(5)], ALONE) / "rank-00000.safetensors").unlink()

    def cut(stop: int | None) -> set[float]:
        """The checkpoints that are resumed after a cut at operation `stop`."""
        place = tmp_path / str(stop)
        shutil.copytree(tmp_path / "before", place / "disk")
        disk = FaultyDisk(place / "disk", stop)
        with disk.watching(monkeypatch):
            try:
                save(place / "disk" / "run", 2, [engine_at(2)], ALONE, keep=1)
                assert stop is None or stop > len(disk.operations)
                ends.append(stop)
            except PowerCut:
                assert len(disk.operations) == stop
        kinds.update(disk.operations)
        steps = set()
        for after in disk.after_cut(place):
            remove_strays(after / "run")
            found = agree(after / "run", ALONE, lambda _: None)
            assert found is not None
            assert all((weight == found.step).all() for weight in found.weights().values())
            assert not list((after / "run" / "checkpoints").glob(".*"))
            steps.add(found.step)
        shutil.rmtree(place)
        return steps

    ends: list[int | None] = []
    kinds: set[str] = set()
    found = [cut(1)]
    while not ends:
        found.append(cut(len(found) + 1))
    assert len(found) > 12 and kinds >= {"write", "sync", "exchange" if damaged else "rename", "unlink"}
    assert found[0] == {1} and found[-1] == {2}
    moment = next(index for index, steps in enumerate(found) if 2 in steps)
    assert all(steps == {1} for steps in found[:moment]) and found[moment + 1 :].count({2}) >= 2


def test_the_first_checkpoint_of_a_run_survives_a_power_cut_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    disk = FaultyDisk(tmp_path / "disk")
    with disk.watching(monkeypatch):
        save(tmp_path / "disk" / "run", 1, [engine_at(1)], ALONE)
    found = agree(disk.after_cut(tmp_path)[0] / "run", ALONE, print)
    assert found is not None and found.step == 1


def test_kill_9_at_any_moment_leaves_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    """Ten processes that train and save at every step; the worker compares what they left bit for bit."""
    output = Child([sys.executable, str(WORKER), str(tmp_path), "10"]).finish()
    killed, writing, last = (int(word) for word in output.split()[-3:])
    assert killed == 10 and writing >= 2 and last >= 10, output
