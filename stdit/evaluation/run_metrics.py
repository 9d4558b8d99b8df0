"""Reads metrics.jsonl of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stdit.files import whole_objects


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind if given. Lines without a step, or cut off by a crash, are left out."""
    lines = whole_objects(Path(folder) / "metrics.jsonl")
    return [line for line in lines if isinstance(line.get("step"), int) and kind in (None, line.get("kind"))]
