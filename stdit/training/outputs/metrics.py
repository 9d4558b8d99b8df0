"""Writes metrics.jsonl (see metrics_schema.json) and TensorBoard; measures the machine's peak rate."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from stdit.files import publish_text, writing

SCHEMA = Path(__file__).with_name("metrics_schema.json")


class MetricsLog:
    """Appends lines to metrics.jsonl of a run folder, and their numbers to TensorBoard.

    step: where the run goes on. Lines of later steps, which a killed process wrote, are dropped.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            publish_text(path, "".join(line + "\n" for line in kept))
        self._path, self._file = path, path.open("ab", buffering=0)  # unbuffered, so that close cannot fail
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a line. Numbers that are not finite become null."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **{k: _plain(v) for k, v in values.items()}}
        with writing(self._path):
            content = json.dumps(line).encode() + b"\n"
            while content:  # a nearly full disk takes a part before it raises
                content = content[self._file.write(content) :]
        if self._writer is not None:
            with writing(self._path.parent / "tensorboard"):
                for name, value in line.items():
                    if name not in ("kind", "step", "time") and isinstance(value, int | float):
                        self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            with writing(self._path.parent / "tensorboard"):
                self._writer.close()


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of this process's matrix products, the best within `seconds`. MFU is relative to it."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)

    def once() -> float:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return 2 * size**3 / best


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
