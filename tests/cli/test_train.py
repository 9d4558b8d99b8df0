"""`stdit train --dry-run` as a person and as a program read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stdit.cli.main import app, run_command

CONFIG = """
model: {dim: 64, heads: 4, layers: 4, ffn_dim: 128, text_dim: 32}
vae: {preset: toy}
data: {shapes: [64x64x9], cache: somewhere}
run: {precision: bf16}
schedule: {steps: 1000}
"""


def dry_run(folder: Path, *told: str) -> int:
    (folder / "c.yaml").write_text(CONFIG)
    return run_command(app, ["train", str(folder / "c.yaml"), "--dry-run", *told], prog="stdit")


def test_a_table_says_what_fits_and_how_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert dry_run(tmp_path, "--world-size", "8", "--gpu", "4090", "parallel.deepspeed=zero1") == 0
    said = capsys.readouterr().out
    assert "parameters that train" in said and "as if every clip were of the largest shape, 64x64x9" in said
    assert "8 ranks: 1 micro-steps per step" in said and "zero3_offload" in said
    rows = [line for line in said.splitlines() if "│ attention" in line]
    assert len(rows) == 3 and all(row.count("*") == 4 for row in rows)  # 1, 2 or 4 of 4 heads; fits under every stage
    assert "at 40% of 165.2 TFLOP/s per rank" in said and "for 1,000 steps" in said and "does not fit" not in said
    assert dry_run(tmp_path, "--gpu", "4090", "--mfu", "0.2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gpu"]["name"] == "GeForce RTX 4090" and told["mfu"] == 0.2 and told["world_size"] == 1
    assert told["configured"]["settings"] == "parallel.deepspeed=null parallel.recompute=none"
    assert told["configured"]["seconds"] == pytest.approx(1000 * told["configured"]["step_seconds"])
    assert (
        sum(size for part, size in told["configured"]["memory"].items() if part != "total")
        == (told["configured"]["memory"]["total"])
    )


def test_a_run_that_does_not_fit_is_told_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["model.preset=1.3B", "model.dim=1536", "model.heads=12", "model.layers=30", "model.ffn_dim=8960"]
    assert dry_run(tmp_path, "--gpu", "4090", "data.shapes=[832x480x81]", "vae.preset=wan2.1", *huge) == 0
    said = capsys.readouterr().out
    assert "does not fit: " in said and "Fits: parallel.deepspeed=zero3_offload parallel.recompute=" in said


@pytest.mark.parametrize("option", [["--world-size", "2"], ["--gpu", "h200"], ["--mfu", "0.3"], ["--json"]])
def test_options_of_a_dry_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert run_command(app, ["train", str(tmp_path / "c.yaml"), *option], prog="stdit") == 2
    assert f"{option[0]} goes with --dry-run" in capsys.readouterr().err


def test_an_unknown_card_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(tmp_path, "--gpu", "h20") == 1
    assert "--gpu h20: not a known card" in capsys.readouterr().err
