"""All ranks resume the same whole checkpoint: damage is named and passed over, different views are an error."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoints import save
from thread_world import ThreadWorld
from torch import nn

from stdit.errors import StditError
from stdit.training.engine import checkpoint
from stdit.training.engine.agreement import agree, check_shared
from stdit.training.engine.checkpoint import MANIFEST, Checkpoint, shard_name, step_name
from stdit.training.engine.engine import Engine, ShardPiece
from stdit.training.engine.parallel import World

RANKS = 2
FILES = (MANIFEST, shard_name(0), shard_name(1))


class PartEngine(Engine):
    """One rank's part of a parameter."""

    def __init__(self, rank: int, value: float) -> None:
        self.flat_masters = [nn.Parameter(torch.full((500,), value))]
        self.pieces = [[ShardPiece("weight", (500 * RANKS,), 500 * rank, 0, 500)]]
        self.optimizer = torch.optim.SGD(self.flat_masters)


def write(run: Path, *steps: int) -> None:
    def save_all(rank: int) -> None:
        for step in steps:
            save(run, step, [PartEngine(rank, float(step))], ThreadWorld(rank, RANKS, torch.device("cpu")))

    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(save_all, range(RANKS)))


def resume(*runs: Path, ranks: int = RANKS) -> tuple[list[Checkpoint | None], list[BaseException | None], list[str]]:
    """What each rank resumes or ends in, and what rank 0 says. runs: what rank 0, 1, … has under the run's path."""
    said: list[str] = []

    def work(rank: int) -> Checkpoint | None:
        world = ThreadWorld(rank, ranks, torch.device("cpu"))
        return agree(runs[min(rank, len(runs) - 1)], world, said.append if rank == 0 else lambda _: None)

    with ThreadPoolExecutor(ranks) as pool:
        jobs = [pool.submit(work, rank) for rank in range(ranks)]
        errors = [job.exception(60) for job in jobs]
    return [job.result() for job, error in zip(jobs, errors) if error is None], errors, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    write(folder, 1, 2)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", 0, 0.001, 0.1, 0.5, 0.9, 1])
def test_damage_is_named_and_the_one_before_is_taken(run: Path, name: str, damage: str | float) -> None:
    """A number: a bit is flipped at this share of the file."""
    file = run / "checkpoints" / step_name(2) / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        assert isinstance(damage, int | float)
        content[int(damage * (len(content) - 1))] ^= 1 << len(content) % 8
        file.write_bytes(content)
    found, errors, said = resume(run)
    assert errors == [None] * RANKS
    assert [one.step for one in found if one] == [1] * RANKS
    assert len(said) == 1 and said[0].startswith("step-00000002 is refused: ") and str(file) in said[0]
    for one in found:
        assert one is not None and (one.weights()["weight"] == 1).all()


def test_if_all_are_damaged_nothing_is_started_anew(run: Path) -> None:
    for step, name in ((1, shard_name(1)), (2, MANIFEST)):
        (run / "checkpoints" / step_name(step) / name).unlink()
    found, errors, _ = resume(run)
    assert not found
    for error in errors:
        with pytest.raises(StditError, match=r"no checkpoint is whole.*2 is refused.*1 is refused.*Restore one"):
            raise error or AssertionError


def test_a_rank_that_sees_an_older_checkpoint_is_named_on_every_rank(run: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(run, older)
    shutil.rmtree(older / "checkpoints" / step_name(2))
    nothing = tmp_path / "nothing"
    for views, here, there in (
        ((run, older), step_name(2), step_name(1)),
        ((older, run), step_name(1), step_name(2)),
        ((run, nothing), step_name(2), "nothing"),
        ((nothing, run), "nothing", step_name(2)),
    ):
        found, errors, said = resume(*views)
        assert not found and not said
        for error in errors:
            expected = rf"checkpoints: rank 0 .* sees {here} and rank 1 .* sees {there} as the newest .*run=PATH"
            with pytest.raises(StditError, match=expected):
                raise error or AssertionError
    assert resume(nothing) == ([None] * RANKS, [None] * RANKS, [])


def test_a_rank_that_sees_other_files_is_named_on_every_rank(run: Path, tmp_path: Path) -> None:
    """The same names, but another run's content, or a manifest that is not there yet."""
    other = tmp_path / "other"
    write(other, 1)
    shutil.copytree(other / "checkpoints" / step_name(1), other / "checkpoints" / step_name(2))
    found, errors, _ = resume(run, other, ranks=2)
    assert not found
    for error in errors:
        with pytest.raises(StditError, match=r"step-00000002: rank 0 .* and rank 1 .* as its manifest's SHA-256\. All"):
            raise error or AssertionError
    (other / "checkpoints" / step_name(2) / MANIFEST).unlink()
    found, errors, _ = resume(run, other)
    assert not found and all("manifest.json is missing" in str(error) for error in errors)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_each_shard_is_hashed_by_one_rank(run: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, real = [], checkpoint.sha256_of

    def count(file: object) -> str:
        hashed.append(os.path.basename(file.name))  # type: ignore[attr-defined]
        return real(file)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "sha256_of", count)
    found, _, _ = resume(run, ranks=ranks)
    assert len(found) == ranks and sorted(hashed) == [shard_name(0), shard_name(1)]


def test_a_folder_that_is_not_shared_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    def check(places: list[Path]) -> list[BaseException | None]:
        worlds: list[World] = [ThreadWorld(rank, RANKS, torch.device("cpu")) for rank in range(RANKS)]
        with ThreadPoolExecutor(RANKS) as pool:
            jobs = [pool.submit(check_shared, place, world) for place, world in zip(places, worlds)]
            return [job.exception(60) for job in jobs]

    same, other = tmp_path / "same", tmp_path / "other"
    assert check([same, same]) == [None, None]
    for error in check([same, other]):
        with pytest.raises(StditError, match=r"rank 0 .* and rank 1 .* sees nothing of what rank 0 has just written"):
            raise error or AssertionError
    assert not list(same.iterdir()) and not other.exists()
