"""Reads metrics.jsonl of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind if given. Lines without a step, or cut off by a crash, are left out."""
    path = Path(folder) / "metrics.jsonl"
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and kind in (None, line.get("kind")):
            lines.append(line)
    return lines
