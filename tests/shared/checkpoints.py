"""Checkpoints as tests make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stdit.training.engine.checkpoint import CheckpointConfig, step_name
from stdit.training.engine.engine import Engine
from stdit.training.engine.parallel import World
from stdit.training.engine.saver import Saver


def save(
    run: Path, step: int, engines: Sequence[Engine], world: World, state: dict[str, Any] | None = None, keep: int = 0
) -> Path:
    """Publishes a checkpoint and returns its folder. All ranks call it together."""
    saver = Saver(run, CheckpointConfig(keep=keep), world)
    saver.start(step, engines, state or {})
    saver.finish()
    return run / "checkpoints" / step_name(step)


def half_written(run: Path) -> list[Path]:
    """The shards of a checkpoint that is being written; none if it gets its name at this moment."""
    try:
        return list(run.glob("checkpoints/.tmp-*/rank-*"))
    except FileNotFoundError:  # Python 3.11's glob
        return []
