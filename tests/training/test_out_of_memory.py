"""A step for which there is not enough memory: what the message says, and how the command ends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.cli.main import app, run_command
from stdit.training.objectives.flow import FlowModule


@pytest.mark.parametrize("kind", ["the allocator's", "the GPU's", "Python's"])
def test_the_message_says_what_was_needed_and_what_needs_less(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    forward = FlowModule.forward

    def too_large(self: FlowModule, batch: Any) -> Any:
        if batch.pack.tokens.device.type == "meta":  # the forecast
            return forward(self, batch)
        if kind == "the GPU's":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")
        return torch.empty(2**60) if kind == "the allocator's" else bytearray(2**60)

    monkeypatch.setattr(FlowModule, "forward", too_large)
    deep = "model.layers=12"  # so that activations are most of it
    command = ["train", str(tiny / "flow.yaml"), f"run={tmp_path / 'run'}", "data.workers=0", deep]
    assert run_command(app, command, prog="stdit") == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    found = re.search(r"step 1: out of memory on rank 0 \((.+?)\)\. By the forecast its pack of (\d+) tokens", line)
    assert found and 10 <= int(found[2]) <= 200
    assert {"the GPU's": "20.00 GiB", "the allocator's": "allocate memory", "Python's": "MemoryError"}[kind] in found[1]
    assert re.search(r"Less: .*parallel\.recompute=all 0\.\d+ GiB", line) and "plan.tokens_per_pack" in line


def test_other_errors_stay_what_they_are(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: FlowModule, batch: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(FlowModule, "forward", fails)
    command = ["train", str(tiny / "flow.yaml"), f"run={tmp_path / 'run'}", "data.workers=0"]
    with pytest.raises(RuntimeError, match="shapes cannot"):
        run_command(app, command, prog="stdit")
