"""Weights & Biases: one run over all processes of a training, and no error of it that stops one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stdit.errors import StditError
from stdit.training.outputs.boards import WeightsAndBiases


class Service:
    """Stands in for the package `wandb`; `fails` names the call that raises."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.begun, self.logged = fails, list[dict[str, Any]](), list[dict[str, Any]]()

    def init(self, **settings: Any) -> SimpleNamespace:
        self._may_fail("init")
        self.begun.append(settings)
        return SimpleNamespace(
            define_metric=lambda *_, **__: None, log=self.log, finish=lambda: self._may_fail("finish")
        )

    def log(self, values: dict[str, Any]) -> None:
        self._may_fail("log")
        self.logged.append(values)

    def _may_fail(self, call: str) -> None:
        if call == self.fails:
            raise ConnectionError("no route to the service")


def test_a_training_that_goes_on_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", service := Service())
    for step in (1, 2):
        board = WeightsAndBiases(tmp_path, "project", {"run": {"seed": 3}})
        board.write({"train/loss": 0.5}, step)
        board.close()
    first, second = service.begun
    assert first == second and (first["project"], first["resume"], first["dir"]) == ("project", "allow", str(tmp_path))
    assert first["config"] == {"run": {"seed": 3}}
    assert service.logged == [{"train/loss": 0.5, "step": 1}, {"train/loss": 0.5, "step": 2}]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_an_error_of_the_service_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Service(call))
    board = WeightsAndBiases(tmp_path, "project", {})
    board.write({"train/loss": 0.5}, 1)
    board.write({"train/loss": 0.5}, 2)
    board.close()
    assert capsys.readouterr().err.count("log.wandb: no route to the service. The training goes on") == 1


def test_without_the_package_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(StditError, match=r"log\.wandb=project needs Weights & Biases: pip install 'stdit\[wandb\]'"):
        WeightsAndBiases(tmp_path, "project", {})


def test_the_real_package_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    code = (
        "import sys; from pathlib import Path; from stdit.training.outputs.boards import WeightsAndBiases as W\n"
        "board = W(Path(sys.argv[1]), 'project', {'seed': 3}); board.write({'train/loss': 0.5}, int(sys.argv[2]))\n"
        "board.close()"
    )
    for step in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), step], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "log.wandb" not in done.stderr, done.stderr
    name = (tmp_path / "wandb-id").read_text().strip()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{name}"))) == 2, json.dumps(list(map(str, tmp_path.rglob("*"))))
