"""A run folder is one training's alone, and a training's export neither fails on nor destroys what it only reads."""

from __future__ import annotations

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from stdit import locks
from stdit.errors import StditError
from stdit.evaluation.report import read_metrics
from stdit.training.config import load_config
from stdit.training.engine.checkpoint import remove_strays
from stdit.training.engine.parallel import World
from stdit.training.outputs import export
from stdit.training.outputs.boards import TensorBoard
from stdit.training.outputs.step_log import MetricsLog
from stdit.training.run import run

ALONE = World(0, 1, torch.device("cpu"))


class Pair(World):
    """Two ranks that are threads of this process."""

    values: ClassVar[dict[int, Any]] = {}
    barrier: ClassVar[threading.Barrier] = threading.Barrier(2)

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait(300)
        found = [self.values[rank] for rank in range(2)]
        self.barrier.wait(300)
        return found


def both(work: Any) -> list[BaseException | None]:
    """What the two ranks end in."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work, Pair(rank, 2, torch.device("cpu"))) for rank in range(2)]
        return [job.exception(300) for job in jobs]


def test_a_second_training_in_a_run_folder_is_refused_on_every_rank(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WAIT", 0.0)
    config = load_config(tiny / "flow.yaml", [f"run={tmp_path / 'run'}"])
    with locks.locked(tmp_path / "run", "a training", "", keep=True):
        before = os.listdir(tmp_path / "run")
        first, second = both(lambda world: run(config, world))
        assert os.listdir(tmp_path / "run") == before
    assert isinstance(first, StditError) and "run: is in use by a training (process" in str(first)
    assert isinstance(second, StditError) and "is in use by a training" in str(second)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "model/model_index.json", "checkpoints/pytorch.bin"])
def test_strangers_files_in_the_run_folder_stay(tiny: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"mine": 1}\n')
    with pytest.raises(StditError, match=rf"run holds {name.split('/')[0]}, which no training wrote"):
        run(load_config(tiny / "flow.yaml", [f"run={tmp_path / 'run'}"]), ALONE)
    assert mine.read_text() == '{"mine": 1}\n' and len(os.listdir(tmp_path / "run")) == 1


def test_a_run_is_no_url_and_no_file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for place, said in (("s3://bucket/run", "a URL"), ("file", "not a folder"), ("file/run", "not a folder")):
        with pytest.raises(StditError, match=said):
            run(load_config(tiny / "flow.yaml", [f"run={place}"]), ALONE)
    assert os.listdir(tmp_path) == ["file"]


def test_what_an_export_would_fail_on_or_destroy_is_said_before(tiny: Path, tmp_path: Path) -> None:
    init, place = tmp_path / "init", tmp_path / "run"
    (init / "text_encoder").mkdir(parents=True)
    (init / "model_index.json").write_text(json.dumps({"text_encoder": ["a", "b"], "transformer": ["a", "b"]}))

    def check(*told: str) -> None:
        export.check_export(load_config(tiny / "flow.yaml", [f"run={place}", *told]))

    (tmp_path / "tune.yaml").write_text("{}")

    def check_whole() -> None:
        told = [f"run={place}", f"model.init={init}", f"vae.path={init}", f"text.path={init}"]
        export.check_export(load_config(tmp_path / "tune.yaml", told))

    check_whole()
    (init / "text_encoder" / "model.safetensors").symlink_to("../blobs/none")
    with pytest.raises(StditError, match=r"init/text_encoder/model\.safetensors: is a link to \.\./blobs/none"):
        check_whole()
    (place / "model" / "vae").mkdir(parents=True)
    with pytest.raises(StditError, match=r"run/model: is there already, and no training wrote it"):
        check()
    (place / "model" / "export.json").write_text('{"format": 1, "step": 3}')
    check()
    (tmp_path / "link").symlink_to(place / "model")
    with pytest.raises(StditError, match=r"vae\.path is .*link/vae, in .*which the run would replace"):
        check(f"vae.path={tmp_path / 'link' / 'vae'}")


def test_leftovers_of_an_export_are_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / ".tmp-model" / "text_encoder"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    left.chmod(0o555)
    export.publish_model(tmp_path, 3, lambda folder: (folder / "vae").mkdir(parents=True))
    assert export.exported_step(tmp_path) == 3 and sorted(os.listdir(tmp_path / "model")) == ["export.json", "vae"]
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "model").rename(tmp_path / ".model.old")  # killed between the two renames of a system without exchange
    remove_strays(tmp_path)
    assert export.exported_step(tmp_path) == 3 and os.listdir(tmp_path) == ["model"]


def test_an_export_on_a_full_disk_names_one_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "vae").mkdir(parents=True)

    export.publish_model(tmp_path, 3, write)

    def full(folder: Path) -> None:
        write(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StditError, match=r"^\S*\.tmp-model: no space left on the disk\. [^:]*: [^:]*$"):
        export.publish_model(tmp_path, 6, full)
    assert export.exported_step(tmp_path) == 3
    export.publish_model(tmp_path, 6, write)
    assert export.exported_step(tmp_path) == 6 and os.listdir(tmp_path) == ["model"]


def test_numbers_within_mappings_are_logged_as_the_others(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, [TensorBoard(tmp_path, 0)])
    log.write("eval", 3, loss=0.5, toy={"64x64x17": {"shape": 0.25, "colour": float("nan")}}, samples=["a.mp4"])
    log.close()
    (line,) = read_metrics(tmp_path, "eval")
    assert line["toy"] == {"64x64x17": {"shape": 0.25, "colour": None}}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {"eval/loss": [(3, 0.5)], "eval/toy/64x64x17/shape": [(3, 0.25)]}


def test_metrics_on_a_full_disk_name_their_file_and_go_on_later(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write("train", 1, loss=0.5)

    class Full:
        """A disk with room for five bytes more."""

        room = 5

        def write(self, content: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.room = content[: self.room], self.room - min(len(content), self.room)
            return real.write(taken)

        def close(self) -> None:
            real.close()

    real, log._file = log._file, Full()  # type: ignore[assignment]
    with pytest.raises(StditError, match=r"^\S*/metrics\.jsonl: no space left on the disk"):
        log.write("train", 2, loss=0.25)
    log.close()
    again = MetricsLog(tmp_path, 1)
    again.write("train", 2, loss=0.25)
    again.close()
    assert [line["step"] for line in read_metrics(tmp_path, "train")] == [1, 2]
