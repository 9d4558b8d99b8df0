"""What the tests of `stdit sample` share."""

from __future__ import annotations

from pathlib import Path

from stdit.cli.main import run_command
from stdit.cli.sample.command import sample

PROMPTS = ["a red circle moves left", "A blue square!"]


def run(folder: Path, out: Path, *args: object) -> int:
    words = ["--model", folder, "--out", out, "--steps", 2, "--guidance", 2, "--device", "cpu", *args]
    return run_command(sample, [str(word) for word in words], prog="sample.py")
