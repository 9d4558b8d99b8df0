"""benchmarks/learning.py: what it reads from runs, and that it goes on and reads again what is there."""

from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import Child
from rich.console import Console

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "learning.py"
LEARNING = runpy.run_path(str(BENCHMARK))
MEASURES = LEARNING["MEASURES"]


def made(setting: str, seed: int, right: list[float], loss: list[float]) -> Any:
    curves = {"64x64x17": dict.fromkeys(MEASURES, right)}
    return LEARNING["Run"](setting, seed, [100.0, 200.0, 300.0], [5.0, 10.0, 15.0], loss, curves)


@pytest.mark.parametrize(
    ("shares", "clips", "seconds"),
    [
        ([0.9, 1.0, 1.0], 150.0, 7.5),  # half of the way from 90 to 100 %
        ([0.95, 1.0, 1.0], 100.0, 5.0),
        ([1.0, 0.9, 1.0], 250.0, 12.5),  # lost again
        ([1.0, 1.0, 0.9], None, None),
    ],
)
def test_goals_count_once_they_stay_met(shares: list[float], clips: float | None, seconds: float | None) -> None:
    run = made("a", 0, shares, [1.0, 1.0, 1.0])
    assert run.until({"colour": 0.95, "shape": 0.5}, run.clips) == pytest.approx(clips)
    assert run.until({"colour": 0.95}, run.seconds) == pytest.approx(seconds)


def test_a_run_is_read_with_the_clips_and_seconds_of_each_evaluation(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(1, 5):
        lines.append({"kind": "train", "step": step, "clips": 10 + step, "cpu_seconds": 0.5 * step})
        if step % 2 == 0:
            shares = {"64x64x17": dict.fromkeys([*MEASURES, "all"], step / 4)}
            levels = {"0-0.5": 1.0 / step, "0.5-1": 2.0 / step}
            lines.append({"kind": "eval", "step": step, "loss": 9.0, "loss_by_level": levels, "toy": shares})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = LEARNING["read_run"](tmp_path, "a", 3)
    assert (run.setting, run.seed, run.clips, run.seconds) == ("a", 3, [23, 50], [1.5, 5.0])
    assert run.loss == [0.75, 0.375] and run.right["64x64x17"] == {name: [0.5, 1.0] for name in MEASURES}


def test_the_table_and_the_picture_have_every_setting(tmp_path: Path) -> None:
    from PIL import Image

    plain = made("plain", 0, [0.1, 0.5, 0.6], [2.0, 1.0, 0.5]), made("plain", 1, [0.2, 0.4, 0.9], [2.0, 1.1, 0.4])
    quick = made("quick", 0, [0.5, 0.9, 1.0], [1.0, 0.5, 0.2]), made("quick", 1, [0.6, 0.8, 1.0], [1.0, 0.4, 0.3])
    results = {"plain": [*plain], "quick": [*quick]}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(LEARNING["table"](results))
    lines = console.export_text().splitlines()
    first, second = (next(line for line in lines if name in line) for name in results)
    assert "never, never" in first and "0.450 (0.400–0.500)" in first and "60%" in first and "50.0" in first
    assert "250, 275" in second and "12, 14" in second and "100%" in second  # 95 % between 90 and 100, 80 and 100
    LEARNING["draw"](results, tmp_path / "learning.png")
    pixels = np.asarray(Image.open(tmp_path / "learning.png").convert("RGB")).reshape(-1, 3)
    for colour in LEARNING["COLOURS"][:2]:
        assert (pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum() > 500


def test_settings_are_named_or_given() -> None:
    parse = LEARNING["parse_setting"]
    assert parse("muon") == ("muon", LEARNING["SETTINGS"]["muon"])
    assert parse("a=optimizer.lr=1 'b=[1, 2]'") == ("a", ["optimizer.lr=1", "b=[1, 2]"])
    with pytest.raises(SystemExit, match="muno is none of adamw, muon"):
        parse("muno")


@pytest.mark.slow
def test_runs_are_trained_once(tiny: Path, tmp_path: Path) -> None:
    overrides = [f"data.manifest={tiny}/manifest.parquet", f"eval.manifest={tiny}/manifest.parquet"]
    overrides += [f"vae.path={tiny}/vae", "data.cache=null", "data.shapes=[32x32x5,48x32x5,32x32,48x32]"]
    overrides += ["model.dim=24", "model.heads=2", "model.layers=1", "model.ffn_dim=48", "eval.steps=1"]
    command = [sys.executable, str(BENCHMARK), f"small={' '.join(overrides)}", "--out", str(tmp_path / "out")]
    command += ["--seeds", "5", "--steps", "3", "--every", "2", "--captions", "2", "--shapes", "32x32x5"]
    Child(command).finish()
    written = {name: (tmp_path / "out" / name).read_bytes() for name in ("learning.json", "small-5/metrics.jsonl")}
    (run,) = json.loads(written["learning.json"])["runs"]["small"]
    assert run["seed"] == 5 and len(run["clips"]) == len(run["loss"]) == 2 and run["clips"][1] > run["clips"][0] > 0
    assert list(run["right"]) == ["32x32x5"] and run["seconds"][1] > run["seconds"][0] > 0
    assert (tmp_path / "out" / "learning.png").stat().st_size > 10_000
    Child(command).finish()
    assert written == {name: (tmp_path / "out" / name).read_bytes() for name in written}
